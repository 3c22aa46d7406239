# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernels of multiway linear layers, including the FFN's. One launch computes all experts."""

# T packed rows; a product sums over K columns and has N columns. A program computes one ROWS x COLUMNS tile of the
# result and sums in steps of DEPTH.
#
# Experts own the row ranges [0, stop_0), [stop_0, stop_1) and [stop_1, stop_2); an absent expert has no rows. A tile
# belongs to one expert, and the program selects the expert's parameters from three pointers. So no table of pointers is
# sent to the device, and weights are never concatenated. Triton also knows that arguments are aligned. If a tile has
# fewer than ROWS rows, its last row is read again in place of the missing ones, so loads need no mask of rows.
#
# Widths are compile-time constants. So the compiler knows the alignment of rows, and masks columns only if the width is
# not a multiple of the tile's width. Offsets between tiles have 64 bits, those within a tile 32.
#
# Products of float32 do not use tensor cores, so they are not rounded to TF32 (input_precision "ieee").

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.5**0.5)


@triton.jit
def select_expert(expert, of_0, of_1, of_2):
    """Returns one of three pointers or numbers: the one of the expert with index `expert` (0, 1 or 2)."""
    return tl.where(expert == 0, of_0, tl.where(expert == 1, of_1, of_2))


@triton.jit
def find_row_tile(tile, stop_0, stop_1, stop_2, ROWS: tl.constexpr):
    """Returns the expert, first row and stop row of the row tile with index `tile`.

    A row tile has at most ROWS rows, all of one expert.
    """
    tiles_0 = tl.cdiv(stop_0, ROWS)
    tiles_1 = tiles_0 + tl.cdiv(stop_1 - stop_0, ROWS)
    expert = (tile >= tiles_0).to(tl.int32) + (tile >= tiles_1).to(tl.int32)
    start = select_expert(expert, 0, stop_0, stop_1)
    first = start + (tile - select_expert(expert, 0, tiles_0, tiles_1)) * ROWS
    return expert, first, tl.minimum(first + ROWS, select_expert(expert, stop_0, stop_1, stop_2))


@triton.jit
def gelu(x):
    """Computes the exact (erf) GELU in float32."""
    return x * 0.5 * (1 + tl.erf(x * SQRT_HALF))


@triton.jit
def tile_of_program(program, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """Returns the row tile and the column tile that the Triton program with index `program` computes.

    Up to GROUP consecutive programs have the same column tile and different row tiles. The values that they all read,
    such as the weights of these columns, then stay in the L2 cache.
    """
    first = program // (GROUP * num_column_tiles) * GROUP
    size = tl.minimum(num_row_tiles - first, GROUP)
    within = program % (GROUP * num_column_tiles)
    return first + within % size, within // size


@triton.jit
def place(stop_0, stop_1, stop_2, num_column_tiles, ROWS: tl.constexpr, GROUP: tl.constexpr):
    """Returns the expert, first row, number of rows and column tile of the running Triton program."""
    num_row_tiles = tl.cdiv(stop_0, ROWS) + tl.cdiv(stop_1 - stop_0, ROWS) + tl.cdiv(stop_2 - stop_1, ROWS)
    row_tile, column_tile = tile_of_program(tl.program_id(0), num_row_tiles, num_column_tiles, GROUP)
    expert, first, stop = find_row_tile(row_tile, stop_0, stop_1, stop_2, ROWS)
    return expert, first.to(tl.int64), stop - first, column_tile


@triton.jit
def load_block(pointers, present, WHOLE: tl.constexpr):
    """Loads a block of values, with 0 where `present` is false.

    If WHOLE is true, all values are present, and the load needs no mask.
    """
    if WHOLE:
        return tl.load(pointers)
    return tl.load(pointers, mask=present, other=0.0)


@triton.jit
def product(
    x_ptr,
    w_ptr,
    rows,
    columns,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Computes one tile of a matrix product in float32: x[rows] @ w[columns].T."""
    whole: tl.constexpr = K % DEPTH == 0
    x_pointers = x_ptr + rows[:, None] * K
    w_pointers = w_ptr + tl.minimum(columns, N - 1)[None, :] * K
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, K, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        x = load_block(x_pointers + depth[None, :], depth[None, :] < K, whole)
        w = load_block(w_pointers + depth[:, None], depth[:, None] < K, whole)
        total = tl.dot(x, w, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def projection_kernel(
    x_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    residual_ptr,
    factor_ptr,
    y_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of y = residual + factor * (x @ w.T + b).

    If RESIDUAL, FACTOR or BIAS is false, the kernel leaves out residual, factor or b.
    """
    expert, first, num_rows, column_tile = place(stop_0, stop_1, stop_2, tl.cdiv(N, COLUMNS), ROWS, GROUP)
    within = tl.arange(0, ROWS)
    rows = tl.minimum(within, num_rows - 1)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_columns = columns < N
    w_ptr = select_expert(expert, w_0_ptr, w_1_ptr, w_2_ptr)
    y = product(x_ptr + first * K, w_ptr, rows, columns, N, K, ROWS, COLUMNS, DEPTH)
    if BIAS:
        bias = load_block(select_expert(expert, b_0_ptr, b_1_ptr, b_2_ptr) + columns, real_columns, N % COLUMNS == 0)
        y += bias[None, :].to(tl.float32)
    if FACTOR:
        y *= tl.load(factor_ptr + first + rows)[:, None].to(tl.float32)
    offsets = within[:, None] * N + columns[None, :]
    present = (within < num_rows)[:, None] & real_columns[None, :]
    if RESIDUAL:
        y += tl.load(residual_ptr + first * N + offsets, mask=present, other=0.0).to(tl.float32)
    tl.store(y_ptr + first * N + offsets, y.to(y_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def up_projection_kernel(
    x_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    b_0_ptr,
    b_1_ptr,
    b_2_ptr,
    u_ptr,
    a_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of u = x @ w.T + b, and of gelu(u). u is rounded to the output's dtype before the GELU."""
    expert, first, num_rows, column_tile = place(stop_0, stop_1, stop_2, tl.cdiv(N, COLUMNS), ROWS, GROUP)
    within = tl.arange(0, ROWS)
    rows = tl.minimum(within, num_rows - 1)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_rows, real_columns = within < num_rows, columns < N
    w_ptr = select_expert(expert, w_0_ptr, w_1_ptr, w_2_ptr)
    u = product(x_ptr + first * K, w_ptr, rows, columns, N, K, ROWS, COLUMNS, DEPTH)
    if BIAS:
        bias = load_block(select_expert(expert, b_0_ptr, b_1_ptr, b_2_ptr) + columns, real_columns, N % COLUMNS == 0)
        u += bias[None, :].to(tl.float32)
    offsets = within[:, None] * N + columns[None, :]
    present = real_rows[:, None] & real_columns[None, :]
    u = u.to(u_ptr.dtype.element_ty)
    a = gelu(u.to(tl.float32)).to(a_ptr.dtype.element_ty)
    # a is stored first. If u is stored first, the compiler computes erf in two layouts and spills registers.
    tl.store(a_ptr + first * N + offsets, a, mask=present)
    tl.store(u_ptr + first * N + offsets, u, mask=present)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def input_gradient_kernel(
    dy_ptr,
    factor_ptr,
    w_0_ptr,
    w_1_ptr,
    w_2_ptr,
    dx_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    K: tl.constexpr,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of dx = factor * (dy @ w), with one factor per row and the w of each row's expert.

    dy has K columns, dx has N columns, and w is (K, N). If FACTOR is false, the kernel leaves out factor.
    """
    expert, first, num_rows, column_tile = place(stop_0, stop_1, stop_2, tl.cdiv(N, COLUMNS), ROWS, GROUP)
    within = tl.arange(0, ROWS)
    rows = tl.minimum(within, num_rows - 1)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_columns = columns < N
    dy_pointers = dy_ptr + first * K + rows[:, None] * K
    w_pointers = select_expert(expert, w_0_ptr, w_1_ptr, w_2_ptr) + columns[None, :]
    dx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in tl.range(0, K, DEPTH):
        depth = begin + tl.arange(0, DEPTH)
        dy = load_block(dy_pointers + depth[None, :], depth[None, :] < K, K % DEPTH == 0)
        present = (depth < K)[:, None] & real_columns[None, :]
        w = load_block(w_pointers + depth[:, None] * N, present, (K % DEPTH == 0) & (N % COLUMNS == 0))
        dx = tl.dot(dy, w, dx, input_precision="ieee")
    if FACTOR:
        dx *= tl.load(factor_ptr + first + rows)[:, None].to(tl.float32)
    present = (within < num_rows)[:, None] & real_columns[None, :]
    tl.store(dx_ptr + first * N + within[:, None] * N + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=present)
