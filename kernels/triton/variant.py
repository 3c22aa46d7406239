"""Defines kernel variants. A variant is a Triton kernel with the argument types and constants of one compilation."""

from typing import Any, NamedTuple


class KernelVariant(NamedTuple):
    """Holds a kernel with the argument types and constants for which `ahead_of_time` compiles it.

    A launch on a GPU uses the same types and constants.
    """

    name: str
    """Unique name, made of file, kernel, dtype and sizes: for example "packed_attention forward bf16 K=88". The name is
    the variant's key in budgets.json."""
    kernel: Any
    """Function decorated with `triton.jit`."""
    signature: dict[str, str]
    """Triton type of each argument by name, in the order of the arguments: for example "*bf16", "i32" or "constexpr".
    """
    constants: dict[str, Any]
    """Value of each constexpr argument, by name."""
    num_warps: int
    """Warps per Triton program."""
    num_stages: int
    """Number of loop steps whose memory loads overlap (software pipelining)."""
    is_common: bool = True
    """Whether the default tests compile this variant. The slow tests compile all variants."""
    is_memory_bound: bool = False
    """Whether the kernel has no matrix product. If true, tests require that every access to rows is 128 bits wide."""


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
    """Builds a variant, and puts the argument types into the order of the kernel's arguments.

    Args:
        name: see `KernelVariant`.
        kernel: function decorated with `triton.jit`.
        types: Triton type of each argument that is not constexpr, by name.
        constants: value of each constexpr argument, by name.
        num_warps: see `KernelVariant`.
        num_stages: see `KernelVariant`.
        is_common: see `KernelVariant`.
        is_memory_bound: see `KernelVariant`.
    """
    missing = set(kernel.arg_names) ^ (set(types) | set(constants))
    assert not missing, f"{name}: arguments {sorted(missing)} are missing or unknown"
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    return KernelVariant(name, kernel, signature, constants, num_warps, num_stages, is_common, is_memory_bound)
