"""Linear layers of several experts over contiguous row slices of one packed stream."""

# T packed rows, D input width, F output width; an expert owns rows [start, stop).

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Slices = Sequence[tuple[int, int]]
"""Row ranges [start, stop) in ascending order that cover the stream, one an expert."""


def multiway_linear_reference(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """What `multiway_linear` computes, in plain PyTorch."""
    parts = [F.linear(x_TD[start:stop], w, b) for (start, stop), w, b in zip(slices, weights, biases, strict=True)]
    return torch.cat(parts)


def multiway_linear(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor], *, gelu: bool = False
) -> Tensor:
    """Applies each expert's linear layer to its own rows, writing into one output without copies.

    Computes y[start:stop] = x[start:stop] @ w_FD.T + b_F for every expert. An expert without rows gets zero gradients,
    so every parameter takes part in every call. Without biases the result is a partial one, to be summed over the ranks
    that hold other columns of x before `multiway_bias` adds them once.

    Args:
        x_TD: packed rows.
        slices: row range of each expert; together they cover [0, T) in order.
        weights: one (F, D) matrix an expert, of x's dtype; saved for the backward pass as they are.
        biases: one (F,) vector an expert; empty for none.
        gelu: apply the exact (erf) GELU to x first, keep x alone and make the GELU again in the backward pass.

    Returns:
        y_TF, of x's dtype.
    """
    return _MultiwayLinear.apply(x_TD, tuple(slices), gelu, *weights, *biases)


def multiway_bias(y_TF: Tensor, slices: Slices, biases: Sequence[Tensor]) -> Tensor:
    """Adds each expert's bias to its own rows, in place: y[start:stop] += b_F.

    Args:
        y_TF: rows that nothing else needs unchanged.
        slices: row range of each expert; together they cover [0, T) in order.
        biases: one (F,) vector an expert.
    """
    return _MultiwayBias.apply(y_TF, tuple(slices), *biases)


class _MultiwayLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, slices: Slices, gelu: bool, *parameters: Tensor) -> Tensor:
        ctx.slices, ctx.gelu, ctx.has_biases = slices, gelu, len(parameters) > len(slices)
        weights, biases = parameters[: len(slices)], parameters[len(slices) :] or (None,) * len(slices)
        # The parameters themselves, not views or casts: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(x_TD, *weights)
        h_TD = F.gelu(x_TD) if gelu else x_TD
        y_TF = x_TD.new_empty(x_TD.shape[0], weights[0].shape[0])
        for (start, stop), w_FD, b_F in zip(slices, weights, biases, strict=True):
            if b_F is None:
                torch.mm(h_TD[start:stop], w_FD.t(), out=y_TF[start:stop])
            else:
                torch.addmm(b_F, h_TD[start:stop], w_FD.t(), out=y_TF[start:stop])
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, *weights = ctx.saved_tensors
        dy_TF = dy_TF.contiguous()
        h_TD = F.gelu(x_TD) if ctx.gelu else x_TD
        dx_TD = torch.empty_like(x_TD)
        d_weights, d_biases = [], []
        for (start, stop), w_FD in zip(ctx.slices, weights, strict=True):
            dy_slice = dy_TF[start:stop]
            torch.mm(dy_slice, w_FD, out=dx_TD[start:stop])
            d_weights.append(dy_slice.t() @ h_TD[start:stop])
            if ctx.has_biases:
                d_biases.append(dy_slice.sum(0))
        if ctx.gelu:
            dx_TD = torch.ops.aten.gelu_backward(dx_TD, x_TD)
        return (dx_TD, None, None, *d_weights, *d_biases)


class _MultiwayBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_TF: Tensor, slices: Slices, *biases: Tensor) -> Tensor:
        for (start, stop), b_F in zip(slices, biases, strict=True):
            y_TF[start:stop].add_(b_F)
        ctx.mark_dirty(y_TF)
        ctx.slices = slices
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        return (dy_TF, None, *(dy_TF[start:stop].sum(0) for start, stop in ctx.slices))
