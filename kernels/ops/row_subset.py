"""Copies some rows out of the residual stream, so that layers compute only these, and writes the results back."""

# T packed rows, K picked rows, D width.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.differentiation import once_differentiable


def take_rows(x_TD: Tensor, rows_K: Tensor) -> tuple[Tensor, Tensor]:
    """Copies some rows out of the residual stream.

    Args:
        x_TD: residual stream.
        rows_K: distinct row numbers, int64.

    Returns:
        The stream, and the copied rows (K, D). Use the returned stream only as an argument of `put_rows`.
    """
    stream_TD, x_KD = _TakeRows.apply(x_TD, rows_K)
    return stream_TD, x_KD


def put_rows(stream_TD: Tensor, y_KD: Tensor, rows_K: Tensor) -> Tensor:
    """Returns a copy of the residual stream, with new rows in place of the rows that `take_rows` copied.

    Every `take_rows` needs a `put_rows`. The backward pass of `put_rows` returns its output gradient as the gradient of
    `stream_TD`, unchanged. In the rows `rows_K`, this gradient is wrong, but the backward pass of `take_rows` then
    overwrites these rows with the right values. This saves a pass that clears gradients, and a pass that adds
    gradients.

    Args:
        stream_TD: residual stream that `take_rows` returned.
        y_KD: new rows.
        rows_K: row numbers that were passed to `take_rows`.

    Returns:
        A new residual stream (T, D); `stream_TD` is unchanged.
    """
    y_TD: Tensor = _PutRows.apply(stream_TD, y_KD, rows_K)
    return y_TD


# The row numbers are stored on ctx, not with `save_for_backward`: recomputation of a block stops at the last tensor
# saved that way. Under ZeRO-3 it must stop at the same module on all ranks, also on those that compute all rows.


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows_K: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rows_K = rows_K
        return x_TD.view_as(x_TD), _select(x_TD, rows_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream_TD: Tensor, dx_KD: Tensor) -> tuple[Tensor, None]:
        return _replace(d_stream_TD, dx_KD, ctx.rows_K), None


class _PutRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream_TD: Tensor, y_KD: Tensor, rows_K: Tensor) -> Tensor:
        ctx.rows_K = rows_K
        return _replace(stream_TD, y_KD, rows_K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy_TD, _select(dy_TD, ctx.rows_K), None


def _select(x_TD: Tensor, rows_K: Tensor) -> Tensor:
    return torch.index_select(x_TD, 0, rows_K, out=ALLOCATOR.empty(x_TD, len(rows_K), x_TD.shape[1]))


def _replace(x_TD: Tensor, y_KD: Tensor, rows_K: Tensor) -> Tensor:
    return ALLOCATOR.empty_like(x_TD).copy_(x_TD).index_copy_(0, rows_K, y_KD)
