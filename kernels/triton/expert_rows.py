# mypy: disable-error-code="no-untyped-def"
"""Defines Triton functions that all row-streaming kernels use.

A row-streaming kernel computes rows one after another, without a matrix product. Each Triton program computes
consecutive rows of one expert. The functions of this file find these rows, load an expert's parameter, and add the
results of several programs.
"""

# D width, E experts (3; the last ones may have no rows), P programs, S sums per program, e.g. for scale and for shift.
#
# A program works on up to `rows` consecutive rows of one expert, never of two. Each program sums over its own rows. A
# second kernel then adds up the sums of an expert's programs in a fixed order. There are no atomics, so the result is
# deterministic.

import triton
import triton.language as tl


@triton.jit
def _first_programs(rows, stop_0, stop_1, stop_2):
    """Returns three numbers: the index of expert 1's first program, the index of expert 2's first program, and the
    number of programs.
    """
    first_1 = tl.cdiv(stop_0, rows)
    first_2 = first_1 + tl.cdiv(stop_1 - stop_0, rows)
    return first_1, first_2, first_2 + tl.cdiv(stop_2 - stop_1, rows)


@triton.jit
def rows_of(program, rows, stop_0, stop_1, stop_2):
    """Returns the expert (0, 1 or 2), the start row and the stop row of the Triton program with index `program`."""
    first_1, first_2, _ = _first_programs(rows, stop_0, stop_1, stop_2)
    expert = (program >= first_1).to(tl.int32) + (program >= first_2).to(tl.int32)
    start = program * rows
    stop = stop_0
    if expert == 1:
        start = stop_0 + (program - first_1) * rows
        stop = stop_1
    if expert == 2:
        start = stop_1 + (program - first_2) * rows
        stop = stop_2
    return expert, start, tl.minimum(start + rows, stop)


@triton.jit
def load_of_expert(expert, ptr_0, ptr_1, ptr_2, D: tl.constexpr, BLOCK: tl.constexpr):
    """Loads one expert's parameter: D values, then zeros up to BLOCK values, all in float32.

    Each `if` below has its own load. If the code chose a pointer first and then loaded from it, the compiler would not
    know the pointer's alignment.
    """
    columns = tl.arange(0, BLOCK)
    if expert == 0:
        x = tl.load(ptr_0 + columns, mask=columns < D, other=0.0)
    elif expert == 1:
        x = tl.load(ptr_1 + columns, mask=columns < D, other=0.0)
    else:
        x = tl.load(ptr_2 + columns, mask=columns < D, other=0.0)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "stop_0", "stop_1", "stop_2"])
def sum_kernel(
    partial_sum_ptr,
    sum_ptr,
    rows,
    stop_0,
    stop_1,
    stop_2,
    D: tl.constexpr,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Adds up, for each expert, the partial sums of the Triton programs that computed the expert's rows.

    Reads float32 partial sums (S, P, D): S sums of width D from each of P programs. Writes the sums per expert, (S, E,
    D) for E experts, in the output's dtype. One program of this kernel computes BLOCK columns of one sum for one
    expert.
    """
    expert = tl.program_id(1)
    kind = tl.program_id(2)
    first_1, first_2, num_programs = _first_programs(rows, stop_0, stop_1, stop_2)
    start = tl.where(expert == 0, 0, tl.where(expert == 1, first_1, first_2))
    stop = tl.where(expert == 0, first_1, tl.where(expert == 1, first_2, num_programs))
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([PROGRAMS, BLOCK], tl.float32)
    for begin in tl.range(start, stop, PROGRAMS):
        programs = begin + tl.arange(0, PROGRAMS)
        real = (programs[:, None] < stop) & (columns[None, :] < D)
        offsets = (kind * num_programs + programs[:, None]) * D + columns[None, :]
        total += tl.load(partial_sum_ptr + offsets, mask=real, other=0.0)
    result = tl.sum(total, 0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + (kind * E + expert) * D + columns, result, mask=columns < D)
