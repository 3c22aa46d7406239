"""One Triton kernel as it is compiled for one architecture."""

from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """What `ahead_of_time` needs to compile a kernel as a launch on a GPU would."""

    name: str
    """File, kernel and what it is specialised on, e.g. "packed_attention forward bf16 K=88"."""
    kernel: Any
    """The function under `triton.jit`."""
    signature: dict[str, str]
    """Type of every argument in order: "*bf16", "i32", ..., or "constexpr"."""
    constants: dict[str, Any]
    """Values of the constexpr arguments."""
    num_warps: int
    """Warps of a program."""
    num_stages: int
    """Stages of software pipelining."""
    is_common: bool = True
    """Whether the default tests compile it; the slow ones compile all."""
    is_memory_bound: bool = False
    """Whether it only streams rows: no products, and each access to them is to be 128 bits wide."""


def build_variant(
    name: str,
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    is_common: bool = True,
    is_memory_bound: bool = False,
) -> KernelVariant:
    """Builds a variant, with the signature in the order of the kernel's arguments.

    Args:
        name: see `KernelVariant`.
        kernel: the function under `triton.jit`.
        types: type of every argument that is not constexpr.
        constants: value of every argument that is.
        num_warps: see `KernelVariant`.
        num_stages: see `KernelVariant`.
        is_common: see `KernelVariant`.
        is_memory_bound: see `KernelVariant`.
    """
    missing = set(kernel.arg_names) ^ (set(types) | set(constants))
    assert not missing, f"{name}: arguments {sorted(missing)} are missing or unknown"
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    return KernelVariant(name, kernel, signature, constants, num_warps, num_stages, is_common, is_memory_bound)
