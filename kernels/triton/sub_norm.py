# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernels of the sub-LN (Magneto, arXiv:2210.06423): statistics, normalised rows, gradients."""

# T packed rows, N columns; a program works on blocks of ROWS x COLUMNS of one expert's rows (`find_row_tile`).
#
# The norm is xhat * scale + shift with xhat = (a - mean) * rstd. Here a is x, or gelu(x) rounded to x's dtype. If
# tensor-parallel ranks divide the columns, mean and rstd are those of the whole row.
# Everything is computed in float32. Sums have a fixed order, so results are deterministic.

import triton
import triton.language as tl

from beit3_ds.kernels.triton.multiway_ffn import SQRT_HALF, find_row_tile, gelu, select_expert

INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def activate(x, GELU: tl.constexpr):
    """Returns x in float32 or, with GELU, gelu(x) rounded to x's dtype and converted to float32."""
    if GELU:
        return gelu(x.to(tl.float32)).to(x.dtype).to(tl.float32)
    return x.to(tl.float32)


@triton.jit
def gelu_derivative(x):
    """Returns the derivative of the exact (erf) GELU at x, in float32."""
    x = x.to(tl.float32)
    density = INVERSE_SQRT_2_PI * tl.exp(-0.5 * x * x)
    return 0.5 * (1 + tl.erf(x * SQRT_HALF)) + x * density


@triton.jit
def _place(stop_0, stop_1, stop_2, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the block of the running Triton program: expert, first row, row offsets, row mask, columns, column mask.

    A mask is True for rows or columns that exist.
    """
    expert, first, stop = find_row_tile(tl.program_id(0), stop_0, stop_1, stop_2, ROWS)
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    return expert, first.to(tl.int64), rows, rows < stop - first, columns, columns < N


@triton.jit
def _column_values(expert, of_0_ptr, of_1_ptr, of_2_ptr, columns, real_columns):
    pointer = select_expert(expert, of_0_ptr, of_1_ptr, of_2_ptr)
    return tl.load(pointer + columns, mask=real_columns, other=0.0)[None, :].to(tl.float32)


@triton.jit
def row_statistics_kernel(x_ptr, mean_ptr, squares_ptr, N: tl.constexpr, BLOCK: tl.constexpr, GELU: tl.constexpr):
    """Computes the mean and the sum of squared deviations of one row of x or, with GELU, of gelu(x)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    a = activate(tl.load(x_ptr + row * N + columns, mask=columns < N, other=0.0), GELU)
    mean = tl.sum(a) / N
    deviations = tl.where(columns < N, a - mean, 0.0)
    tl.store(mean_ptr + row, mean)
    tl.store(squares_ptr + row, tl.sum(deviations * deviations))


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def normalize_kernel(
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_0_ptr,
    scale_1_ptr,
    scale_2_ptr,
    shift_0_ptr,
    shift_1_ptr,
    shift_2_ptr,
    n_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes one block of n = LN(a), or n = a without NORM. With GELU, a = gelu(x); otherwise, a = x.

    The forward pass does not save n. The backward pass computes n again for the weight gradient.
    """
    expert, first, rows, real_rows, columns, real_columns = _place(stop_0, stop_1, stop_2, N, ROWS, COLUMNS)
    offsets = rows[:, None] * N + columns[None, :]
    present = real_rows[:, None] & real_columns[None, :]
    n = activate(tl.load(x_ptr + first * N + offsets, mask=present, other=0.0), GELU)
    if NORM:
        mean = tl.load(mean_ptr + first + rows, mask=real_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + first + rows, mask=real_rows, other=0.0)[:, None]
        scale = _column_values(expert, scale_0_ptr, scale_1_ptr, scale_2_ptr, columns, real_columns)
        shift = _column_values(expert, shift_0_ptr, shift_1_ptr, shift_2_ptr, columns, real_columns)
        n = (n - mean) * rstd * scale + shift
    tl.store(n_ptr + first * N + offsets, n.to(n_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def norm_gradient_sums_kernel(
    dn_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_0_ptr,
    scale_1_ptr,
    scale_2_ptr,
    row_sums_ptr,
    column_sums_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    GELU: tl.constexpr,
    SPAN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes row sums and column sums of one tile with SPAN rows and COLUMNS columns.

    The norm's input is `a`: gelu(x) with GELU, and x without GELU. The gradient of the norm's output is `dn`. The
    standardised row is `xhat` = (a - mean) * rstd. For each row, the kernel sums dn * scale and dn * scale * xhat over
    the tile's columns. For each column, it sums dn * xhat and dn over the tile's rows. The row sums of all tiles are
    (column tiles, 2, rows), and the column sums are (row tiles, 2, columns).
    """
    expert, first, stop = find_row_tile(tl.program_id(0), stop_0, stop_1, stop_2, SPAN)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real_columns = columns < N
    scale = _column_values(expert, scale_0_ptr, scale_1_ptr, scale_2_ptr, columns, real_columns)
    d_scale = tl.zeros([ROWS, COLUMNS], tl.float32)
    d_shift = tl.zeros([ROWS, COLUMNS], tl.float32)
    row_sums_ptr += tl.program_id(1).to(tl.int64) * 2 * stop_2
    for begin in tl.range(first, stop, ROWS):
        rows = tl.cast(begin, tl.int64) + tl.arange(0, ROWS)
        real_rows = rows < stop
        mean = tl.load(mean_ptr + rows, mask=real_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=real_rows, other=0.0)[:, None]
        offsets = rows[:, None] * N + columns[None, :]
        present = real_rows[:, None] & real_columns[None, :]
        dn = tl.load(dn_ptr + offsets, mask=present, other=0.0).to(tl.float32)
        xhat = (activate(tl.load(x_ptr + offsets, mask=present, other=0.0), GELU) - mean) * rstd
        d_scale += dn * xhat
        d_shift += dn
        dn *= scale
        tl.store(row_sums_ptr + rows, tl.sum(dn, 1), mask=real_rows)
        tl.store(row_sums_ptr + stop_2 + rows, tl.sum(dn * xhat, 1), mask=real_rows)
    column_sums_ptr += tl.program_id(0).to(tl.int64) * 2 * N
    tl.store(column_sums_ptr + columns, tl.sum(d_scale, 0), mask=real_columns)
    tl.store(column_sums_ptr + N + columns, tl.sum(d_shift, 0), mask=real_columns)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def norm_gradient_kernel(
    dn_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    scale_0_ptr,
    scale_1_ptr,
    scale_2_ptr,
    sums_ptr,
    dx_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    WIDTH: tl.constexpr,
    GELU: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes one block of dx, the gradient of a sub-LN's input or, with GELU, of the GELU's input.

    The norm's input is called a, and its gradient da. With GELU, a = gelu(x), and dx = da * gelu'(x). Otherwise, a = x,
    and dx = da. dn is the gradient of the norm's output. xhat is the standardised row (a - mean) * rstd. With NORM, da
    = rstd * (dn * scale - sums_0 / WIDTH - xhat * sums_1 / WIDTH). Without NORM, da is dn.

    For each row, sums_0 is the sum of dn * scale, and sums_1 is the sum of dn * scale * xhat, both over the columns of
    all tensor-parallel ranks. WIDTH is the number of these columns. dx may be stored in the memory of dn, because a
    program reads its block before it writes the block.
    """
    expert, first, rows, real_rows, columns, real_columns = _place(stop_0, stop_1, stop_2, N, ROWS, COLUMNS)
    offsets = rows[:, None] * N + columns[None, :]
    present = real_rows[:, None] & real_columns[None, :]
    x = tl.load(x_ptr + first * N + offsets, mask=present, other=0.0)
    dx = tl.load(dn_ptr + first * N + offsets, mask=present, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.load(mean_ptr + first + rows, mask=real_rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + first + rows, mask=real_rows, other=0.0)[:, None]
        sum_0 = tl.load(sums_ptr + first + rows, mask=real_rows, other=0.0)[:, None]
        sum_1 = tl.load(sums_ptr + stop_2 + first + rows, mask=real_rows, other=0.0)[:, None]
        scale = _column_values(expert, scale_0_ptr, scale_1_ptr, scale_2_ptr, columns, real_columns)
        xhat = (activate(x, GELU) - mean) * rstd
        dx = rstd * (dx * scale - (sum_0 + xhat * sum_1) / WIDTH)
    if GELU:
        dx *= gelu_derivative(x)
    tl.store(dx_ptr + first * N + offsets, dx.to(dx_ptr.dtype.element_ty), mask=present)
