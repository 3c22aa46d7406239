"""Divides experts' rows among the programs of row-streaming kernels, and launches the kernel that sums over programs.

A row-streaming kernel computes one row after the other, without a matrix product.
"""

# T packed rows, D width, E experts (at most 3), P programs, S sums per program, e.g. for scale and for shift.

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.kernels.triton.architecture import NUM_MULTIPROCESSORS
from beit3_ds.kernels.triton.expert_rows import sum_kernel
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, Launch
from beit3_ds.kernels.triton.launch_sizes import ceil_div, next_power_of_2
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant

NUM_EXPERTS = 3
"""Number of experts in the kernels' arguments. For a call with fewer experts, experts without rows are added."""

_SUM_WARPS = 4


class SumBlock(NamedTuple):
    """Sets the size of the block of partial sums that the sum kernel adds in one loop step."""

    columns: int
    """Columns per block; one program computes the sums of these columns."""
    programs: int
    """Number of programs whose partial sums are in one block."""


_ROW_SUM_BLOCK = SumBlock(128, 16)
"""Block for row-streaming kernels, which have many programs, and rows with a few thousand columns."""


class RowTiling(NamedTuple):
    """Sets how row-streaming kernels are compiled and launched for one architecture and row width."""

    num_warps: int
    """Warps per program, which together hold one row in registers."""
    num_stages: int
    """Number of rows in a program's pipeline: the program computes one row while it loads the next rows."""
    forward_programs: int
    """Maximum number of programs in a forward launch. Each program computes its rows one after the other."""
    backward_programs: int
    """Maximum number of programs in a backward launch. No more programs are launched than can run at once, because each
    program writes float32 sums as wide as a row."""


def choose_row_tiling(architecture: int, width: int) -> RowTiling:
    """Returns the warps, pipeline stages and numbers of programs for row-streaming kernels.

    No compiled variant spills registers, as budgets.json records.

    Args:
        architecture: GPU architecture: 80, 90 or 100.
        width: columns per row, D. At most 8192, so that a thread holds at most 16 columns.
    """
    block = next_power_of_2(width)
    num_warps = max(4, block // 512)
    resident = NUM_MULTIPROCESSORS[architecture] * 16 // num_warps  # programs with 128 registers per thread
    return RowTiling(num_warps, 2 if block > 4096 else 3, 4 * resident, resident)


def row_constants(width: int, tiling: RowTiling) -> dict[str, int]:
    """Returns the constexpr arguments of all row-streaming kernels by name."""
    return {"D": width, "BLOCK": next_power_of_2(width), "STAGES": tiling.num_stages}


def check_rows(*tensors: Tensor) -> None:
    """Asserts that tensors are contiguous and need no offsets beyond 32 bits, as the kernels assume."""
    assert all(map(Tensor.is_contiguous, tensors)), "the kernels' strides are those of contiguous rows"
    for x in tensors:
        assert x.numel() < 2**31, f"{tuple(x.shape)} has offsets beyond 32 bits"


class RowPrograms(NamedTuple):
    """Divides rows among programs. Each program gets at most `rows` consecutive rows of one expert."""

    rows: int
    """Maximum rows per program."""
    stops: tuple[int, ...]
    """Stop row of each of NUM_EXPERTS experts. Expert 0 starts at row 0."""
    num_programs: int
    """Number of programs P."""


def deal_rows(stops: Sequence[int], most_programs: int) -> RowPrograms:
    """Divides rows among at most `most_programs` programs.

    Args:
        stops: stop row of each expert; expert 0 starts at row 0.
        most_programs: maximum number of programs; must be larger than NUM_EXPERTS.
    """
    assert len(stops) <= NUM_EXPERTS < most_programs, f"{len(stops)} experts, {most_programs} programs"
    all_stops = (*stops, *[stops[-1]] * (NUM_EXPERTS - len(stops)))
    rows = max(1, ceil_div(all_stops[-1], most_programs - NUM_EXPERTS))
    starts = (0, *all_stops[:-1])
    num_programs = sum(ceil_div(stop - start, rows) for start, stop in zip(starts, all_stops, strict=True))
    return RowPrograms(rows, all_stops, num_programs)


class RowLaunch(NamedTuple):
    """Holds a launch of a row-streaming kernel, for all layers of a batch."""

    programs: RowPrograms
    """Division of rows among the launch's programs."""
    run: Launch
    """Launches the kernel. Must not be called with an empty grid (zero Triton programs)."""


@lru_cache(maxsize=256)
def prepare_rows(
    launcher: KernelLauncher,
    stops: tuple[int, ...],
    width: int,
    tiling: RowTiling,
    flags: tuple[Any, ...],
    *,
    is_backward: bool = False,
    takes_count: bool = False,
) -> RowLaunch:
    """Prepares a launch of a row-streaming kernel.

    Args:
        launcher: the kernel.
        stops: stop of each expert's rows; expert 0 starts at row 0.
        width: columns of a row, D.
        tiling: how to compile and launch the kernel.
        flags: constexpr arguments after `row_constants`.
        is_backward: whether the programs are those of a backward launch.
        takes_count: whether the kernel takes the number of programs after the number of rows.
    """
    programs = deal_rows(stops, tiling.backward_programs if is_backward else tiling.forward_programs)
    numbers = (programs.rows, *([programs.num_programs] if takes_count else []), *programs.stops)
    constants = (*row_constants(width, tiling).values(), *flags)
    return RowLaunch(
        programs, launcher.prepare((programs.num_programs,), numbers, constants, num_warps=tiling.num_warps)
    )


def for_experts(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Extends a list with one parameter per expert to NUM_EXPERTS entries by repeating the last parameter."""
    missing = NUM_EXPERTS - len(parameters)
    return [*parameters, *[parameters[-1]] * missing] if missing else parameters


def sum_partials(
    partial_SPD: Tensor,
    programs: RowPrograms,
    num_experts: int,
    dtype: torch.dtype,
    block: SumBlock = _ROW_SUM_BLOCK,
) -> Tensor:
    """Adds the partial sums of all programs of an expert, for each expert. Without rows, an expert's sums are zero.

    Args:
        partial_SPD: S sums of width D from each of P programs, float32.
        programs: division of rows among the programs.
        num_experts: number of experts E.
        dtype: dtype of the result.
        block: size of the block that the kernel adds in one loop step.

    Returns:
        Sums per expert, (S, E, D).
    """
    num_kinds, _, width = partial_SPD.shape
    sum_SED = partial_SPD.new_empty(num_kinds, num_experts, width, dtype=dtype)
    _prepare_sum(programs, num_kinds, num_experts, width, block)(partial_SPD, sum_SED)
    return sum_SED


@lru_cache(maxsize=256)
def _prepare_sum(programs: RowPrograms, num_kinds: int, num_experts: int, width: int, block: SumBlock) -> Launch:
    grid = (ceil_div(width, block.columns), num_experts, num_kinds)
    constants = (width, num_experts, block.columns, block.programs)
    return _SUM.prepare(grid, (programs.rows, *programs.stops), constants, num_warps=_SUM_WARPS)


_SUM = KernelLauncher(sum_kernel)


def build_row_variant(
    architecture: int,
    op: str,
    kernel: Any,
    element: str,
    width: int,
    constants: dict[str, Any],
    note: str = "",
    elements: Mapping[str, str] = MappingProxyType({}),
) -> KernelVariant:
    """Builds the variant of a row-streaming kernel for one dtype and width.

    Args:
        architecture: GPU architecture: 80, 90 or 100.
        op: name of the op, which is the start of the variant's name.
        kernel: function decorated with `triton.jit`. Its pointers to statistics and sums have float32 elements.
        element: element type of all other pointers: "bf16", "fp16" or "fp32".
        width: columns per row, D.
        constants: constexpr arguments besides `row_constants`.
        note: text at the end of the variant's name.
        elements: element types of pointers that differ from `element`, by argument name.
    """
    tiling = choose_row_tiling(architecture, width)
    values = {**row_constants(width, tiling), **constants}
    types = {name: f"*{element}" for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {name: "*fp32" for name in ("statistics_ptr", "partial_sum_ptr") if name in types}
    types |= {name: f"*{own}" for name, own in elements.items() if name in types}
    types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in values}
    return build_variant(
        f"{op} {kernel.__name__.removesuffix('_kernel')} {element} D={width}{note}",
        kernel,
        types,
        values,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        is_common=(element, width, note) == ("bf16", 1408, ""),
        is_memory_bound=True,
    )


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants of the sum kernel for ahead-of-time compilation."""
    return [
        build_sum_variant(element, width, _ROW_SUM_BLOCK)
        for element, width in (("bf16", 1408), ("fp16", 1408), ("bf16", 6144), ("fp32", 768))
    ]


def build_sum_variant(element: str, width: int, block: SumBlock) -> KernelVariant:
    """Builds the variant of the sum kernel for one element type and width of the output."""
    return build_variant(
        f"expert_rows sum {element} D={width}",
        sum_kernel,
        {
            "partial_sum_ptr": "*fp32",
            "sum_ptr": f"*{element}",
            "rows": "i32",
            **{f"stop_{expert}": "i32" for expert in range(NUM_EXPERTS)},
        },
        {"D": width, "E": NUM_EXPERTS, "BLOCK": block.columns, "PROGRAMS": block.programs},
        num_warps=_SUM_WARPS,
        num_stages=1,
        is_common=(element, width) == ("bf16", 1408),
        is_memory_bound=True,
    )
