# mypy: disable-error-code="no-untyped-def"
"""Defines the forward and backward Triton kernels of the multiway LayerNorm, with or without a GELU before it."""

# T packed rows, D width, P programs.
#
# A program works on consecutive rows of one expert (expert_rows.py), one row at a time. It keeps the row and the
# expert's parameters in registers, and loads the next rows at the same time. D is a compile-time constant, so the
# compiler knows the alignment of rows and accesses 128 bits at a time.
#
# With GELU, the norm's input is GELU(x) rounded to x's dtype, as if GELU(x) had been stored and loaded.

import triton
import triton.language as tl

from beit3_ds.kernels.triton.expert_rows import load_of_expert, rows_of
from beit3_ds.kernels.triton.sub_norm import activate, gelu_derivative


@triton.jit(do_not_specialize=["rows", "stop_0", "stop_1", "stop_2"])
def forward_kernel(
    x_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    h_ptr,
    statistics_ptr,
    rows,
    stop_0,
    stop_1,
    stop_2,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    EPSILON: tl.constexpr,
    GELU: tl.constexpr,
):
    """Normalizes rows, and computes the statistics of each row before normalization.

    With GELU, the kernel normalizes GELU(x), rounded to x's dtype. Without GELU, it normalizes x. One Triton program
    computes consecutive rows of one expert. The statistics of T rows are (2, T) float32: the mean of each row, then 1 /
    standard deviation of each row.
    """
    expert, start, stop = rows_of(tl.program_id(0), rows, stop_0, stop_1, stop_2)
    w = load_of_expert(expert, w_0_ptr, w_1_ptr, w_2_ptr, D, BLOCK)
    b = load_of_expert(expert, b_0_ptr, b_1_ptr, b_2_ptr, D, BLOCK)
    columns = tl.arange(0, BLOCK)
    real = columns < D
    num_rows = stop_2
    for row in tl.range(start, stop, num_stages=STAGES):
        x = activate(tl.load(x_ptr + row * D + columns, mask=real, other=0.0), GELU)
        mean = tl.sum(x, 0) / D
        centred = tl.where(real, x - mean, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 0) / D + EPSILON)
        h = centred * rstd * w + b
        tl.store(h_ptr + row * D + columns, h.to(h_ptr.dtype.element_ty), mask=real)
        tl.store(statistics_ptr + row, mean)
        tl.store(statistics_ptr + num_rows + row, rstd)


@triton.jit(do_not_specialize=["rows", "num_programs", "stop_0", "stop_1", "stop_2"])
def backward_kernel(
    dh_ptr,
    d_residual_ptr,
    x_ptr,
    statistics_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    dx_ptr,
    partial_sum_ptr,
    rows,
    num_programs,
    stop_0,
    stop_1,
    stop_2,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
):
    """Computes the gradient dx of the rows, and partial sums for the gradients of scale and shift.

    One Triton program computes consecutive rows of one expert, and sums over these rows. The sums of P programs are (2,
    P, D) float32. With RESIDUAL, the gradient of the residual stream is added to dx. dx may be stored in the memory of
    dh, because a row is read before it is written.
    """
    program = tl.program_id(0)
    expert, start, stop = rows_of(program, rows, stop_0, stop_1, stop_2)
    w = load_of_expert(expert, w_0_ptr, w_1_ptr, w_2_ptr, D, BLOCK)
    columns = tl.arange(0, BLOCK)
    real = columns < D
    num_rows = stop_2
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for row in tl.range(start, stop, num_stages=STAGES):
        offsets = row * D + columns
        x = tl.load(x_ptr + offsets, mask=real, other=0.0)
        dh = tl.load(dh_ptr + offsets, mask=real, other=0.0).to(tl.float32)
        rstd = tl.load(statistics_ptr + num_rows + row)
        normed = (activate(x, GELU) - tl.load(statistics_ptr + row)) * rstd
        dw += dh * normed
        db += dh
        scaled = dh * w
        d_mean = tl.sum(scaled, 0) / D
        d_scale = tl.sum(scaled * normed, 0) / D  # `scaled` is 0 in columns from D on
        dx = rstd * (scaled - d_mean - normed * d_scale)
        if GELU:
            dx *= gelu_derivative(x)
        if RESIDUAL:
            dx += tl.load(d_residual_ptr + offsets, mask=real, other=0.0).to(tl.float32)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=real)
    tl.store(partial_sum_ptr + program * D + columns, dw, mask=real)
    tl.store(partial_sum_ptr + (num_programs + program) * D + columns, db, mask=real)
