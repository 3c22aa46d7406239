"""Describes variants of Triton kernels: a kernel with the argument types and constants for which it is compiled."""

from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """Holds a kernel with the argument types and constants for which `ahead_of_time` compiles it.

    They are the same as in a launch on a GPU.
    """

    name: str
    """Unique name, made of the file, the kernel, the dtype and sizes, e.g. "packed_attention forward bf16 K=88". It is
    the variant's key in budgets.json."""
    kernel: Any
    """Kernel, a function decorated with `triton.jit`."""
    signature: dict[str, str]
    """Type of every argument in order: "*bf16", "i32", ..., or "constexpr"."""
    constants: dict[str, Any]
    """Values of the constexpr arguments."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Number of loop steps whose loads from memory overlap (software pipelining)."""
    is_common: bool = True
    """Whether the default tests compile this variant; the slow tests compile all."""
    is_memory_bound: bool = False
    """Whether the kernel only streams rows: it has no products, and every access to rows must be 128 bits wide."""


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
    """Builds a variant whose signature has the order of the kernel's arguments.

    Args:
        name: see `KernelVariant`.
        kernel: the function decorated with `triton.jit`.
        types: type of every argument that is not constexpr.
        constants: value of every constexpr argument.
        num_warps: see `KernelVariant`.
        num_stages: see `KernelVariant`.
        is_common: see `KernelVariant`.
        is_memory_bound: see `KernelVariant`.
    """
    missing = set(kernel.arg_names) ^ (set(types) | set(constants))
    assert not missing, f"{name}: arguments {sorted(missing)} are missing or unknown"
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    return KernelVariant(name, kernel, signature, constants, num_warps, num_stages, is_common, is_memory_bound)
