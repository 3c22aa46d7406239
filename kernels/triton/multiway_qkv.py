# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernels for queries, keys and values. One launch computes the three linear layers (query, key and
value) of all experts.
"""

# T packed rows; a layer has K input columns and N output columns. A program computes one ROWS x COLUMNS tile of the
# result and sums in steps of DEPTH. Rows, experts and widths are as in multiway_ffn.py.
#
# The three layers have separate parameters, so a program selects the pointers of its layer and expert.

import triton
import triton.language as tl

from beit3_ds.kernels.triton.multiway_ffn import load_block, place, product, select_expert


@triton.jit
def _select(layer, expert, q_0, q_1, q_2, k_0, k_1, k_2, v_0, v_1, v_2):
    """Returns the pointer of one layer and one expert. The layer is 0 for queries, 1 for keys, 2 for values."""
    q = select_expert(expert, q_0, q_1, q_2)
    k = select_expert(expert, k_0, k_1, k_2)
    v = select_expert(expert, v_0, v_1, v_2)
    return select_expert(layer, q, k, v)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def qkv_kernel(
    x_ptr,
    qw_0_ptr,
    qw_1_ptr,
    qw_2_ptr,
    kw_0_ptr,
    kw_1_ptr,
    kw_2_ptr,
    vw_0_ptr,
    vw_1_ptr,
    vw_2_ptr,
    qb_0_ptr,
    qb_1_ptr,
    qb_2_ptr,
    kb_0_ptr,
    kb_1_ptr,
    kb_2_ptr,
    vb_0_ptr,
    vb_1_ptr,
    vb_2_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of y = x @ w.T + b for the query, key or value layer of one expert.

    The programs of all three layers run close together, so that they share the rows of x in the L2 cache.
    """
    column_tiles: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    expert, first, num_rows, column_tile = place(stop_0, stop_1, stop_2, 3 * column_tiles, ROWS, GROUP)
    layer = column_tile // column_tiles
    within = tl.arange(0, ROWS)
    rows = tl.minimum(within, num_rows - 1)
    columns = column_tile % column_tiles * COLUMNS + tl.arange(0, COLUMNS)
    real_columns = columns < N
    w_ptr = _select(
        layer, expert, qw_0_ptr, qw_1_ptr, qw_2_ptr, kw_0_ptr, kw_1_ptr, kw_2_ptr, vw_0_ptr, vw_1_ptr, vw_2_ptr
    )
    b_ptr = _select(
        layer, expert, qb_0_ptr, qb_1_ptr, qb_2_ptr, kb_0_ptr, kb_1_ptr, kb_2_ptr, vb_0_ptr, vb_1_ptr, vb_2_ptr
    )
    y_ptr = select_expert(layer, q_ptr, k_ptr, v_ptr)
    y = product(x_ptr + first * K, w_ptr, rows, columns, N, K, ROWS, COLUMNS, DEPTH)
    y += load_block(b_ptr + columns, real_columns, N % COLUMNS == 0)[None, :].to(tl.float32)
    present = (within < num_rows)[:, None] & real_columns[None, :]
    offsets = within[:, None] * N + columns[None, :]
    tl.store(y_ptr + first * N + offsets, y.to(q_ptr.dtype.element_ty), mask=present)


@triton.jit(do_not_specialize=["stop_0", "stop_1", "stop_2"])
def qkv_input_gradient_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qw_0_ptr,
    qw_1_ptr,
    qw_2_ptr,
    kw_0_ptr,
    kw_1_ptr,
    kw_2_ptr,
    vw_0_ptr,
    vw_1_ptr,
    vw_2_ptr,
    dx_ptr,
    stop_0,
    stop_1,
    stop_2,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Computes one tile of dx = dq @ qw + dk @ kw + dv @ vw. dq has K columns, dx has N columns, and qw is (K, N).

    One loop runs over the columns of all three gradients. So the sum stays in registers, in float32.
    """
    expert, first, num_rows, column_tile = place(stop_0, stop_1, stop_2, tl.cdiv(N, COLUMNS), ROWS, GROUP)
    within = tl.arange(0, ROWS)
    rows = tl.minimum(within, num_rows - 1)
    columns = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    real_columns = columns < N
    qw_ptr = select_expert(expert, qw_0_ptr, qw_1_ptr, qw_2_ptr)
    kw_ptr = select_expert(expert, kw_0_ptr, kw_1_ptr, kw_2_ptr)
    vw_ptr = select_expert(expert, vw_0_ptr, vw_1_ptr, vw_2_ptr)
    steps: tl.constexpr = (K + DEPTH - 1) // DEPTH
    dx = tl.zeros([ROWS, COLUMNS], tl.float32)
    for step in tl.range(0, 3 * steps):
        layer = step // steps
        depth = step % steps * DEPTH + tl.arange(0, DEPTH)
        dy_ptr = select_expert(layer, dq_ptr, dk_ptr, dv_ptr) + first * K
        w_ptr = select_expert(layer, qw_ptr, kw_ptr, vw_ptr)
        dy = load_block(dy_ptr + rows[:, None] * K + depth[None, :], depth[None, :] < K, K % DEPTH == 0)
        present = (depth < K)[:, None] & real_columns[None, :]
        whole: tl.constexpr = (K % DEPTH == 0) & (N % COLUMNS == 0)
        w = load_block(w_ptr + depth[:, None] * N + columns[None, :], present, whole)
        dx = tl.dot(dy, w, dx, input_precision="ieee")
    present = (within < num_rows)[:, None] & real_columns[None, :]
    tl.store(dx_ptr + first * N + within[:, None] * N + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=present)
