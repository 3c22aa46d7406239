# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernel of weight gradients. A launch computes the gradients of all layers that share an input."""

# T packed rows, OUT and IN widths of a layer, L layers, E experts, P shares of the rows.
#
# A weight gradient has few tiles: 36 of 128 x 128 for a width of 768, for the 132 multiprocessors of an H100. So the
# rows are divided into shares, and each program sums over the rows of one share. Another launch adds up the shares in a
# fixed order (`expert_rows.sum_kernel`). There are no atomics, so the result is deterministic.

import triton
import triton.language as tl

from beit3_ds.kernels.triton.expert_rows import rows_of
from beit3_ds.kernels.triton.multiway_ffn import select_expert, tile_of_program


@triton.jit
def _transposed_product(
    dy_ptr,
    factor_ptr,
    x_ptr,
    start,
    stop,
    out_columns,
    in_columns,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    FACTOR: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Computes one tile of (factor * dy)[start:stop].T @ x[start:stop]. With SUMS, also sums factor * dy over rows.

    The sums are computed as a product with a matrix of ones, (rows, 16), so they are returned 16 times. A product is
    used because it can read dy from shared memory, while a plain sum needs dy in registers.
    """
    product = tl.zeros([ROWS, COLUMNS], tl.float32)
    sums = tl.zeros([ROWS, 16], tl.float32)
    for begin in tl.range(start, stop, DEPTH):
        within = tl.arange(0, DEPTH)
        real = within < stop - begin
        first = tl.cast(begin, tl.int64)
        # Loads dy transposed, because a tile that is transposed after its load would not be copied asynchronously.
        dy_pointers = dy_ptr + first * OUT + within[None, :] * OUT + out_columns[:, None]
        x_pointers = x_ptr + first * IN + within[:, None] * IN + in_columns[None, :]
        if OUT % ROWS == 0:
            dy = tl.load(dy_pointers, mask=real[None, :], other=0.0)
        else:
            dy = tl.load(dy_pointers, mask=real[None, :] & (out_columns < OUT)[:, None], other=0.0)
        if IN % COLUMNS == 0:
            x = tl.load(x_pointers, mask=real[:, None], other=0.0)
        else:
            x = tl.load(x_pointers, mask=real[:, None] & (in_columns < IN)[None, :], other=0.0)
        if FACTOR:
            factor = tl.load(factor_ptr + first + within, mask=real, other=0.0).to(tl.float32)
            dy = (dy * factor[None, :]).to(dy.dtype)
        product = tl.dot(dy, x, product, input_precision="ieee")
        if SUMS:
            ones = tl.full([DEPTH, 16], 1.0, tl.float32).to(x.dtype)
            sums = tl.dot(dy, ones, sums, input_precision="ieee")
    return product, sums


@triton.jit(do_not_specialize=["rows", "stop_0", "stop_1", "stop_2"])
def weight_gradient_kernel(
    dy_0_ptr,
    dy_1_ptr,
    dy_2_ptr,
    factor_ptr,
    x_ptr,
    sum_ptr,
    stop_0,
    stop_1,
    stop_2,
    rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    LAYERS: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of dw = (factor * dy).T @ x over one share of the rows.

    dw is the weight gradient of one of up to three linear layers with the same input x. A share is a range of one
    expert's rows. With SPLIT, a share has at most `rows` rows. Otherwise, a share has all rows of an expert, possibly
    none. The results for L linear layers and P shares have the shape (L, P, OUT * IN). With BIAS, the shape is (L, P,
    OUT * IN + OUT): after dw, each result contains the sums of factor * dy over rows.
    """
    row_tiles: tl.constexpr = (OUT + ROWS - 1) // ROWS
    column_tiles: tl.constexpr = (IN + COLUMNS - 1) // COLUMNS
    row_tile, column_tile = tile_of_program(tl.program_id(0), row_tiles, column_tiles, GROUP)
    layer = tl.program_id(1)
    share = tl.program_id(2)
    if SPLIT:
        _, start, stop = rows_of(share, rows, stop_0, stop_1, stop_2)
    else:
        start, stop = select_expert(share, 0, stop_0, stop_1), select_expert(share, stop_0, stop_1, stop_2)
    dy_ptr = dy_0_ptr
    if LAYERS > 1:
        dy_ptr = select_expert(layer, dy_0_ptr, dy_1_ptr, dy_2_ptr)
    width: tl.constexpr = OUT * IN + OUT if BIAS else OUT * IN
    dw_ptr = sum_ptr + (layer * tl.num_programs(2) + share).to(tl.int64) * width
    out_columns = row_tile * ROWS + tl.arange(0, ROWS)
    in_columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    if BIAS and column_tile == 0:
        dw, sums = _transposed_product(
            dy_ptr, factor_ptr, x_ptr, start, stop, out_columns, in_columns, OUT, IN, FACTOR, True, ROWS, COLUMNS, DEPTH
        )
        db = tl.sum(sums, 1) * (1 / 16)  # the mean of 16 equal columns, which is exact
        tl.store(dw_ptr + OUT * IN + out_columns, db.to(sum_ptr.dtype.element_ty), mask=out_columns < OUT)
    else:
        dw, sums = _transposed_product(
            dy_ptr,
            factor_ptr,
            x_ptr,
            start,
            stop,
            out_columns,
            in_columns,
            OUT,
            IN,
            FACTOR,
            False,
            ROWS,
            COLUMNS,
            DEPTH,
        )
    present = (out_columns < OUT)[:, None] & (in_columns < IN)[None, :]
    tl.store(dw_ptr + out_columns[:, None] * IN + in_columns[None, :], dw.to(sum_ptr.dtype.element_ty), mask=present)
