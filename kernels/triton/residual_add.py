# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernels, forward and backward, for adding the output of attention or the FFN to the residual
stream.
"""

# T packed rows, D width, P programs; expert_rows.py says which rows a program works on.

import triton
import triton.language as tl

from beit3_ds.kernels.triton.expert_rows import load_of_expert, rows_of


@triton.jit(do_not_specialize=["rows", "stop_0", "stop_1", "stop_2"])
def forward_kernel(
    residual_ptr,
    partial_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    factor_ptr,
    y_ptr,
    rows,
    stop_0,
    stop_1,
    stop_2,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Computes y = residual + factor * (partial + bias). Without FACTOR, the factor is 1.

    One Triton program computes consecutive rows of one expert.
    """
    expert, start, stop = rows_of(tl.program_id(0), rows, stop_0, stop_1, stop_2)
    b = load_of_expert(expert, b_0_ptr, b_1_ptr, b_2_ptr, D, BLOCK)
    columns = tl.arange(0, BLOCK)
    real = columns < D
    for row in tl.range(start, stop, num_stages=STAGES):
        offsets = row * D + columns
        branch = tl.load(partial_ptr + offsets, mask=real, other=0.0).to(tl.float32) + b
        if FACTOR:
            branch *= tl.load(factor_ptr + row).to(tl.float32)
        y = tl.load(residual_ptr + offsets, mask=real, other=0.0).to(tl.float32) + branch
        tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=["rows", "stop_0", "stop_1", "stop_2"])
def backward_kernel(
    dy_ptr,
    factor_ptr,
    d_partial_ptr,
    partial_sum_ptr,
    rows,
    stop_0,
    stop_1,
    stop_2,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """Computes d_partial = factor * dy, the gradient of the branch's output, and sums the rows of d_partial for the
    bias gradient.

    Each Triton program computes consecutive rows of one expert, and writes the sum of these rows. The sums of P
    programs are (P, D) float32. Without FACTOR, d_partial is dy, so the kernel computes only the sums.
    """
    program = tl.program_id(0)
    _, start, stop = rows_of(program, rows, stop_0, stop_1, stop_2)
    columns = tl.arange(0, BLOCK)
    real = columns < D
    total = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(start, stop, num_stages=STAGES):
        offsets = row * D + columns
        d_partial = tl.load(dy_ptr + offsets, mask=real, other=0.0).to(tl.float32)
        if FACTOR:
            d_partial *= tl.load(factor_ptr + row).to(tl.float32)
            tl.store(d_partial_ptr + offsets, d_partial.to(d_partial_ptr.dtype.element_ty), mask=real)
        total += d_partial
    tl.store(partial_sum_ptr + program * D + columns, total, mask=real)
