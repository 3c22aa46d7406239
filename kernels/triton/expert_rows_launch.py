"""Divides experts' rows among Triton programs of row-streaming kernels, and adds the programs' partial sums.

A row-streaming kernel computes rows one after another, without a matrix product.
"""

# T packed rows, D width, E experts (at most 3), P programs, S sums per program, e.g. for scale and for shift.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable, Mapping, Sequence
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
"""Number of experts that the kernels take as arguments. If a model has fewer experts, a launch passes further experts
without rows."""

_SUM_WARPS = 4


class SumBlock(NamedTuple):
    """Holds the size of a block of partial sums. A Triton program of `sum_kernel` adds one block per loop step."""

    columns: int
    """Columns per block. One program of `sum_kernel` computes the sums of these columns."""
    programs: int
    """Number of programs of the row-streaming kernel whose partial sums are in one block."""


_ROW_SUM_BLOCK = SumBlock(128, 16)
"""Block size for adding the partial sums of row-streaming kernels. Such a kernel has many programs, and each program's
partial sums have up to 8192 columns."""


class RowTiling(NamedTuple):
    """Holds compile and launch settings of row-streaming kernels, for one GPU architecture and row width."""

    num_warps: int
    """Warps per Triton program. Together, they hold one row in registers."""
    num_stages: int
    """Pipeline stages of the loop over rows: a program computes one row while it loads the next rows."""
    forward_programs: int
    """Maximum number of Triton programs in a forward launch. Each program computes its rows one after another."""
    backward_programs: int
    """Maximum number of Triton programs in a backward launch. Each program writes rows, and float32 sums that are as
    wide as a row. The limit is about the number of programs that the GPU runs at once, so that few sums are written."""


def choose_row_tiling(architecture: int, width: int) -> RowTiling:
    """Returns compile and launch settings of the row-streaming kernels.

    With these settings, no kernel that is compiled ahead of time spills registers (budgets.json).

    Args:
        architecture: GPU architecture: 80, 90 or 100.
        width: columns per row, D, at most 8192 (`WIDEST`). A thread holds at most 16 columns.
    """
    block = next_power_of_2(width)
    num_warps = max(4, block // 512)
    resident = NUM_MULTIPROCESSORS[architecture] * 16 // num_warps  # programs with 128 registers per thread
    return RowTiling(num_warps, 2 if block > 4096 else 3, 4 * resident, resident)


def row_constants(width: int, tiling: RowTiling) -> dict[str, int]:
    """Returns by name the constexpr arguments that all row-streaming kernels have."""
    return {"D": width, "BLOCK": next_power_of_2(width), "STAGES": tiling.num_stages}


def check_rows(*tensors: Tensor) -> None:
    """Asserts that tensors are contiguous, as the kernels assume."""
    assert all(map(Tensor.is_contiguous, tensors)), "the kernels' strides are those of contiguous rows"


class RowPrograms(NamedTuple):
    """Divides rows among Triton programs. Each program gets at most `rows` consecutive rows of one expert."""

    rows: int
    """Maximum rows per Triton program."""
    stops: tuple[int, ...]
    """Stop row of each expert, NUM_EXPERTS numbers. Expert 0 starts at row 0."""
    num_programs: int
    """Number of Triton programs P."""


def deal_rows(stops: Sequence[int], most_programs: int) -> RowPrograms:
    """Divides rows among at most `most_programs` Triton programs.

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
    """Holds a prepared launch of a row-streaming kernel. Every call of `run` must pass tensors of the same dtypes and
    sizes as the first call.
    """

    programs: RowPrograms
    """Division of the rows among Triton programs."""
    run: Launch
    """Launches the kernel. Do not call `run` if there are no rows, because a launch with zero programs is invalid."""


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
        launcher: launcher of the kernel.
        stops: stop row of each expert; expert 0 starts at row 0.
        width: columns per row, D.
        tiling: compile and launch settings of the kernel.
        flags: constexpr arguments after those of `row_constants`.
        is_backward: True limits the number of Triton programs to `tiling.backward_programs`; False limits this number
            to `tiling.forward_programs`.
        takes_count: whether the kernel takes the number of programs as an argument, directly after its argument `rows`.
    """
    assert stops[-1] * width < 2**31, f"{stops[-1]} rows of {width} columns have offsets beyond 32 bits"
    programs = deal_rows(stops, tiling.backward_programs if is_backward else tiling.forward_programs)
    numbers = (programs.rows, *([programs.num_programs] if takes_count else []), *programs.stops)
    constants = (*row_constants(width, tiling).values(), *flags)
    return RowLaunch(
        programs, launcher.prepare((programs.num_programs,), numbers, constants, num_warps=tiling.num_warps)
    )


def for_experts(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Repeats the last parameter of a list until the list has NUM_EXPERTS parameters.

    Kernels always take NUM_EXPERTS parameters, but a model may have fewer experts, and so fewer parameters in the list.
    """
    missing = NUM_EXPERTS - len(parameters)
    return [*parameters, *[parameters[-1]] * missing] if missing else parameters


def prepare_sum(
    programs: RowPrograms,
    num_kinds: int,
    num_experts: int,
    width: int,
    dtype: torch.dtype,
    block: SumBlock = _ROW_SUM_BLOCK,
) -> Callable[[Tensor], Tensor]:
    """Returns a function that adds, for each expert, the partial sums of all programs that computed the expert's rows.

    The function takes partial sums (S, P, width) in float32, and returns sums per expert, (S, E, width). The sums of an
    expert without rows are zero.

    Args:
        programs: division of the rows among the P programs.
        num_kinds: number of sums per program, S.
        num_experts: number of experts E.
        width: width of each sum.
        dtype: dtype of the result.
        block: number of partial sums that the kernel adds per loop step.
    """
    grid = (ceil_div(width, block.columns), num_experts, num_kinds)
    constants = (width, num_experts, block.columns, block.programs)
    launch = _SUM.prepare(grid, (programs.rows, *programs.stops), constants, num_warps=_SUM_WARPS)

    def add(partial_SPD: Tensor) -> Tensor:
        sum_SED = partial_SPD.new_empty(num_kinds, num_experts, width, dtype=dtype)
        launch(partial_SPD, sum_SED)
        return sum_SED

    return add


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
    """Builds the variant of a row-streaming kernel for one dtype and one row width.

    Args:
        architecture: GPU architecture: 80, 90 or 100.
        op: name of the op, the first word of the variant's name.
        kernel: function decorated with `triton.jit`.
        element: element type of pointers: "bf16", "fp16" or "fp32". Exceptions are statistics and sums, which are
            float32, and the pointers in `elements`.
        width: columns per row, D.
        constants: constexpr arguments besides `row_constants`.
        note: text at the end of the variant's name.
        elements: element types of pointers with another type than `element`, by argument name.
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
    """Returns the variants of `sum_kernel` to compile ahead of time."""
    return [
        build_sum_variant(element, width, _ROW_SUM_BLOCK)
        for element, width in (("bf16", 1408), ("fp16", 1408), ("bf16", 6144), ("fp32", 768))
    ]


def build_sum_variant(element: str, width: int, block: SumBlock) -> KernelVariant:
    """Builds the variant of `sum_kernel` for one element type and one width of the sums."""
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
