# mypy: disable-error-code="no-untyped-def"
"""Defines the forward and backward Triton kernels of packed attention."""

# T packed rows, H heads, K head width, Q sequences, N tiles of TILE positions.
#
# The rows of a sequence are one or two ranges of the packed rows. Its positions 0, 1, ... count the rows of the first
# range and then those of the second. A program computes one tile of positions of one head, and loops over blocks of all
# positions of the sequence. A tile may begin in the first range and end in the second, so a second range needs no
# further tile. Each load and store converts positions to rows; rows are never permuted.
#
# A head is computed in two blocks of columns, with widths A and B. A and B are powers of two, and A + B is at least K:
# 88 columns are computed as 64 + 32 instead of 128. H and K are compile-time constants, so the compiler knows the
# alignment of rows. Without them it did not vectorise or pipeline the loads, and spilled registers.
#
# Products of float32 do not use tensor cores, so they are not rounded to TF32 (input_precision "ieee").

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2.0))


@triton.jit
def _sequence_of(tile, sequences_ptr, tiles_ptr):
    """Returns the tile's first position in its sequence, and four numbers that describe the sequence.

    A sequence consists of two ranges of rows. The four numbers are the first row of range 1, the length of range 1, an
    offset, and the length of the whole sequence. The row of a position in range 2 is the position plus the offset.
    """
    sequence = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    start_1 = tl.load(sequences_ptr + 4 * sequence)
    length_1 = tl.load(sequences_ptr + 4 * sequence + 1)
    start_2 = tl.load(sequences_ptr + 4 * sequence + 2)
    length_2 = tl.load(sequences_ptr + 4 * sequence + 3)
    return first, start_1, length_1, start_2 - length_1, length_1 + length_2


@triton.jit
def _rows(positions, start_1, length_1, offset_2):
    return positions + tl.where(positions < length_1, start_1, offset_2)


@triton.jit
def _column_block(x_ptr, rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    columns = FIRST + tl.arange(0, WIDTH)
    return x_ptr + rows[:, None] * STRIDE + columns[None, :], columns[None, :] < K


@triton.jit
def _load(x_ptr, rows, real, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    """Loads rows of one head, split into two blocks of columns with the widths A and B.

    A head has K columns; if A + B is larger, the remaining columns are 0. Rows where `real` is false are also 0. If B
    is 0, block A is returned twice.
    """
    pointers, columns = _column_block(x_ptr, rows, 0, A, K, STRIDE)
    block_a = tl.load(pointers, mask=real[:, None] & columns, other=0.0)
    block_b = block_a
    if B > 0:
        pointers, columns = _column_block(x_ptr, rows, A, B, K, STRIDE)
        block_b = tl.load(pointers, mask=real[:, None] & columns, other=0.0)
    return block_a, block_b


@triton.jit
def _store(x_ptr, rows, real, x_a, x_b, A: tl.constexpr, B: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr):
    pointers, columns = _column_block(x_ptr, rows, 0, A, K, STRIDE)
    tl.store(pointers, x_a.to(x_ptr.dtype.element_ty), mask=real[:, None] & columns)
    if B > 0:
        pointers, columns = _column_block(x_ptr, rows, A, B, K, STRIDE)
        tl.store(pointers, x_b.to(x_ptr.dtype.element_ty), mask=real[:, None] & columns)


@triton.jit
def _product(x_a, x_b, y_a, y_b, B: tl.constexpr):
    """Returns x @ y.T. Each operand is split into column blocks a and b. If the width B is 0, block b is not used."""
    product = tl.dot(x_a, tl.trans(y_a), input_precision="ieee")
    if B > 0:
        product = tl.dot(x_b, tl.trans(y_b), product, input_precision="ieee")
    return product


@triton.jit
def _zeros(TILE: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    block_a = tl.zeros([TILE, A], tl.float32)
    block_b = block_a
    if B > 0:
        block_b = tl.zeros([TILE, B], tl.float32)
    return block_a, block_b


@triton.jit
def _add_product(x, y_a, y_b, sum_a, sum_b, B: tl.constexpr):
    """Returns sum + x @ y in two column blocks, a and b.

    y and sum are divided into blocks in the same way. B is the width of block b. If B is 0, `sum_b` is returned
    unchanged.
    """
    sum_a = tl.dot(x, y_a, sum_a, input_precision="ieee")
    if B > 0:
        sum_b = tl.dot(x, y_b, sum_b, input_precision="ieee")
    return sum_a, sum_b


@triton.jit
def _visible(queries, keys, length_1, total, CAPTIONS: tl.constexpr):
    """Returns True where a query sees a key. Queries and keys are positions in a sequence of `total` positions.

    Without CAPTIONS, a query sees all keys of the sequence. With CAPTIONS, it sees the first `length_1` keys, and all
    keys up to its own position.
    """
    if CAPTIONS:
        return keys < tl.maximum(length_1, queries + 1)
    return (keys < total) & (queries >= 0)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    lse_ptr,
    sequences_ptr,
    tiles_ptr,
    num_rows,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPTIONS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Computes the attention outputs y of one tile of queries, and each query's log-sum-exp.

    The kernel uses an online softmax over blocks of keys.
    """
    head = tl.program_id(1)
    first, start_1, length_1, offset_2, total = _sequence_of(tl.program_id(0), sequences_ptr, tiles_ptr)
    queries = first + tl.arange(0, TILE)
    real_queries = queries < total
    query_rows = _rows(queries, start_1, length_1, offset_2)
    q_a, q_b = _load(q_ptr + head * K, query_rows, real_queries, A, B, K, H * K)

    top = tl.full([TILE], float("-inf"), tl.float32)
    weight = tl.zeros([TILE], tl.float32)
    y_a, y_b = _zeros(TILE, A, B)
    stop = total
    if CAPTIONS:
        stop = tl.minimum(total, tl.maximum(length_1, first + TILE))
    for begin in tl.range(0, stop, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        key_rows = _rows(keys, start_1, length_1, offset_2)
        k_a, k_b = _load(k_ptr + head * K, key_rows, keys < total, A, B, K, H * K)
        scores = _product(q_a, q_b, k_a, k_b, B)
        scores = tl.where(_visible(queries[:, None], keys[None, :], length_1, total, CAPTIONS), scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * (SCALE * LOG2E))
        p = tl.exp2(scores * (SCALE * LOG2E) - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(p, 1)
        v_a, v_b = _load(v_ptr + head * K, key_rows, keys < total, A, B, K, H * K)
        y_a, y_b = _add_product(p.to(v_a.dtype), v_a, v_b, y_a * shrink[:, None], y_b * shrink[:, None], B)
        top = new_top
    _store(y_ptr + head * K, query_rows, real_queries, y_a / weight[:, None], y_b / weight[:, None], A, B, K, H * K)
    tl.store(lse_ptr + head * num_rows + query_rows, top * LN2 + tl.log(weight), mask=real_queries)


@triton.jit(do_not_specialize=["num_rows"])
def query_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    y_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    sequences_ptr,
    tiles_ptr,
    num_rows,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPTIONS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Computes the gradient dq of one tile of queries.

    Also writes delta = sum(dy * y) of each query, which `key_value_gradient_kernel` reads.
    """
    head = tl.program_id(1)
    first, start_1, length_1, offset_2, total = _sequence_of(tl.program_id(0), sequences_ptr, tiles_ptr)
    queries = first + tl.arange(0, TILE)
    real_queries = queries < total
    query_rows = _rows(queries, start_1, length_1, offset_2)
    statistics = head * num_rows + query_rows
    dy_a, dy_b = _load(dy_ptr + head * K, query_rows, real_queries, A, B, K, H * K)
    y_a, y_b = _load(y_ptr + head * K, query_rows, real_queries, A, B, K, H * K)
    delta = tl.sum(dy_a.to(tl.float32) * y_a.to(tl.float32), 1)
    if B > 0:
        delta += tl.sum(dy_b.to(tl.float32) * y_b.to(tl.float32), 1)
    tl.store(delta_ptr + statistics, delta, mask=real_queries)
    lse = tl.load(lse_ptr + statistics, mask=real_queries, other=0.0) * LOG2E
    q_a, q_b = _load(q_ptr + head * K, query_rows, real_queries, A, B, K, H * K)

    dq_a, dq_b = _zeros(TILE, A, B)
    stop = total
    if CAPTIONS:
        stop = tl.minimum(total, tl.maximum(length_1, first + TILE))
    for begin in tl.range(0, stop, BLOCK):
        keys = begin + tl.arange(0, BLOCK)
        key_rows = _rows(keys, start_1, length_1, offset_2)
        k_a, k_b = _load(k_ptr + head * K, key_rows, keys < total, A, B, K, H * K)
        v_a, v_b = _load(v_ptr + head * K, key_rows, keys < total, A, B, K, H * K)
        scores = _product(q_a, q_b, k_a, k_b, B)
        p = tl.exp2(scores * (SCALE * LOG2E) - lse[:, None])
        p = tl.where(_visible(queries[:, None], keys[None, :], length_1, total, CAPTIONS), p, 0.0)
        dp = _product(dy_a, dy_b, v_a, v_b, B)
        ds = (p * (dp - delta[:, None])).to(k_a.dtype)
        dq_a, dq_b = _add_product(ds, k_a, k_b, dq_a, dq_b, B)
    _store(dq_ptr + head * K, query_rows, real_queries, dq_a * SCALE, dq_b * SCALE, A, B, K, H * K)


@triton.jit(do_not_specialize=["num_rows"])
def key_value_gradient_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dy_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    sequences_ptr,
    tiles_ptr,
    num_rows,
    H: tl.constexpr,
    K: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPTIONS: tl.constexpr,
    SCALE: tl.constexpr,
):
    """Computes the gradients dk and dv of one tile of keys. Rows of score matrices are keys; columns are queries."""
    head = tl.program_id(1)
    first, start_1, length_1, offset_2, total = _sequence_of(tl.program_id(0), sequences_ptr, tiles_ptr)
    keys = first + tl.arange(0, TILE)
    real_keys = keys < total
    key_rows = _rows(keys, start_1, length_1, offset_2)
    k_a, k_b = _load(k_ptr + head * K, key_rows, real_keys, A, B, K, H * K)
    v_a, v_b = _load(v_ptr + head * K, key_rows, real_keys, A, B, K, H * K)

    dk_a, dk_b = _zeros(TILE, A, B)
    dv_a, dv_b = _zeros(TILE, A, B)
    start = 0
    if CAPTIONS:  # in a causal caption, queries before the tile see none of its keys
        start = tl.where(first >= length_1, first // BLOCK * BLOCK, 0)
    for begin in tl.range(start, total, BLOCK):
        queries = begin + tl.arange(0, BLOCK)
        real_queries = queries < total
        query_rows = _rows(queries, start_1, length_1, offset_2)
        statistics = head * num_rows + query_rows
        q_a, q_b = _load(q_ptr + head * K, query_rows, real_queries, A, B, K, H * K)
        dy_a, dy_b = _load(dy_ptr + head * K, query_rows, real_queries, A, B, K, H * K)
        lse = tl.load(lse_ptr + statistics, mask=real_queries, other=0.0) * LOG2E  # 0 is arbitrary: dy is 0 there
        delta = tl.load(delta_ptr + statistics, mask=real_queries, other=0.0)
        scores = _product(k_a, k_b, q_a, q_b, B)
        p = tl.exp2(scores * (SCALE * LOG2E) - lse[None, :])
        if CAPTIONS:
            p = tl.where(_visible(queries[None, :], keys[:, None], length_1, total, CAPTIONS), p, 0.0)
        dv_a, dv_b = _add_product(p.to(dy_a.dtype), dy_a, dy_b, dv_a, dv_b, B)
        dp = _product(v_a, v_b, dy_a, dy_b, B)
        ds = (p * (dp - delta[None, :])).to(q_a.dtype)
        dk_a, dk_b = _add_product(ds, q_a, q_b, dk_a, dk_b, B)
    _store(dk_ptr + head * K, key_rows, real_keys, dk_a * SCALE, dk_b * SCALE, A, B, K, H * K)
    _store(dv_ptr + head * K, key_rows, real_keys, dv_a, dv_b, A, B, K, H * K)
