"""Launching of kernels in which every expert has parameters of its own: which program works on which rows."""

# T packed rows, D width, E experts (at most 3), P programs, S kinds of sums.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from beit3_ds.kernels.expert_rows_triton import sum_kernel
from beit3_ds.kernels.variant import Variant, build_variant
from torch import Tensor

NUM_EXPERTS = 3
"""That the kernels have arguments for; experts that a call has not are empty ones."""

NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Of an A100, an H100 and a B200: what programs are counted for."""

_SUM_COLUMNS, _SUM_PROGRAMS, _SUM_WARPS = 128, 32, 4


class RowPrograms(NamedTuple):
    """How rows are dealt out to programs: up to `rows` consecutive rows of one expert each."""

    rows: int
    """Of a program, at most."""
    stops: tuple[int, ...]
    """Where each of NUM_EXPERTS experts' rows end."""
    num_programs: int
    """P."""


def deal_rows(stops: Sequence[int], most_programs: int) -> RowPrograms:
    """Deals rows out to at most `most_programs` programs: one more than run at once would take as long as all others.

    Args:
        stops: where each expert's rows end; the first begin at 0.
        most_programs: more than the number of experts.
    """
    assert len(stops) <= NUM_EXPERTS < most_programs, f"{len(stops)} experts, {most_programs} programs"
    all_stops = (*stops, *[stops[-1]] * (NUM_EXPERTS - len(stops)))
    rows = max(1, triton.cdiv(all_stops[-1], most_programs - NUM_EXPERTS))
    starts = (0, *all_stops[:-1])
    num_programs = sum(triton.cdiv(stop - start, rows) for start, stop in zip(starts, all_stops, strict=True))
    return RowPrograms(rows, all_stops, num_programs)


def for_experts(parameters: Sequence[Tensor]) -> list[Tensor]:
    """One parameter for each of NUM_EXPERTS experts; those without rows get the last one."""
    assert all(parameter.is_contiguous() for parameter in parameters), "a parameter is not contiguous"
    return [*parameters, *[parameters[-1]] * (NUM_EXPERTS - len(parameters))]


def sum_partials(partial_SPD: Tensor, programs: RowPrograms, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Sums what programs summed over their rows over each expert's programs, (S, E, D); without any, to 0."""
    num_kinds, _, width = partial_SPD.shape
    sum_SED = partial_SPD.new_empty(num_kinds, num_experts, width, dtype=dtype)
    grid = (triton.cdiv(width, _SUM_COLUMNS), num_experts, num_kinds)
    constants = {"D": width, "E": num_experts, "BLOCK": _SUM_COLUMNS, "PROGRAMS": _SUM_PROGRAMS}
    sum_kernel[grid](partial_SPD, sum_SED, programs.rows, *programs.stops, **constants, num_warps=_SUM_WARPS)
    return sum_SED


def variants(architecture: int) -> list[Variant]:
    """The kernel of sums as `ahead_of_time` compiles it."""
    types = {"partial_ptr": "*fp32", "rows": "i32", **{f"stop_{expert}": "i32" for expert in range(NUM_EXPERTS)}}
    constants = {"E": NUM_EXPERTS, "BLOCK": _SUM_COLUMNS, "PROGRAMS": _SUM_PROGRAMS}
    return [
        build_variant(
            f"expert_rows sum {element} D={width}",
            sum_kernel,
            {**types, "sum_ptr": f"*{element}"},
            {**constants, "D": width},
            num_warps=_SUM_WARPS,
            num_stages=1,
            is_common=(element, width) == ("bf16", 1408),
            is_memory_bound=True,
        )
        for element, width in (("bf16", 1408), ("fp16", 1408), ("bf16", 6144), ("fp32", 768))
    ]
