"""Linear layer and cross entropy over a large vocabulary, in chunks of rows so that full logits never exist."""

# M rows, D width, V vocabulary, C rows of one chunk.

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy_reference(h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch with full logits."""
    return F.cross_entropy(_logits(h_MD, w_VD, b_V), target_M, reduction="none")


class Partials(NamedTuple):
    """What one shard of the vocabulary knows of every row's cross entropy, (M,) float32 each.

    The loss is log(total) + largest - target_logit once shards are reduced: the largest of all, the totals rescaled to
    it and summed, the target's logits summed.
    """

    largest: Tensor
    """The largest logit."""
    total: Tensor
    """Sum of exp(logit - largest)."""
    target_logit: Tensor
    """The target's logit; 0 if the target lies in another shard."""


def linear_cross_entropy(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    chunk_size: int | None,
    reduce: Callable[[Partials], Partials] | None = None,
) -> Tensor:
    """Cross entropy of every row against its target.

    With a chunk size, at most `chunk_size` x V logits exist at a time, in float32 (float64 for float64 input), and the
    backward pass recomputes them; without one, all M x V of them are kept for it.

    Args:
        h_MD: rows; zero rows are allowed and give zero gradients.
        w_VD: output matrix, saved for the backward pass as it is.
        b_V: output bias.
        target_M: int64 in [0, V); with shards, one outside [0, V) belongs to another shard.
        chunk_size: rows C of a chunk, or None.
        reduce: joins this shard's partials with those of the others if the vocabulary is sharded; the gradient for h is
            then this shard's part.

    Returns:
        The loss of every row, (M,) float32.
    """
    return _LinearCrossEntropy.apply(h_MD, w_VD, b_V, target_M, chunk_size, reduce)


def cross_entropy_partials(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, chunk_size: int | None
) -> tuple[Partials, Tensor | None]:
    """Computes one shard's partials.

    Args:
        h_MD: rows.
        w_VD: this shard's rows of the output matrix.
        b_V: this shard's bias.
        target_M: index into this shard; a row whose target lies outside it ([0, V)) contributes 0 as target logit.
        chunk_size: rows C of a chunk, or None for all at once.

    Returns:
        The partials; exp(logit - largest), (M, V), if all were computed at once.
    """
    largest_M, total_M, target_logit_M = (h_MD.new_zeros(len(h_MD), dtype=_loss_dtype(h_MD)) for _ in range(3))
    inside_M = (target_M >= 0) & (target_M < w_VD.shape[0])
    kept_MV = None
    for rows in _chunks(h_MD.shape[0], chunk_size):
        logits_CV = _logits(h_MD[rows], w_VD, b_V)
        index_C1 = target_M[rows].clamp(0, w_VD.shape[0] - 1).unsqueeze(1)
        target_logit_M[rows] = logits_CV.gather(1, index_C1).squeeze(1) * inside_M[rows]
        largest_M[rows] = logits_CV.amax(1)
        exponentials_CV = logits_CV.sub_(largest_M[rows].unsqueeze(1)).exp_()
        total_M[rows] = exponentials_CV.sum(1)
        if chunk_size is None:
            kept_MV = exponentials_CV
    return Partials(largest_M, total_M, target_logit_M), kept_MV


def cross_entropy_gradients(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    lse_M: Tensor,
    d_loss_M: Tensor,
    chunk_size: int | None,
    probabilities_MV: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for rows, matrix and bias, given the log-sum-exp over the whole vocabulary.

    Args:
        h_MD: rows.
        w_VD: this shard's rows of the output matrix.
        b_V: this shard's bias.
        target_M: index into this shard.
        lse_M: log(sum exp(logits)) of every row, float32.
        d_loss_M: gradient of every row's loss, float32.
        chunk_size: rows C of a chunk, or None for all at once.
        probabilities_MV: of this shard, if they were kept; they are left as they are.

    Returns:
        dh_MD (partial if w is a shard of the vocabulary), dw_VD and db_V.
    """
    dh_MD, dw_VD, db_V = torch.empty_like(h_MD), torch.zeros_like(w_VD), torch.zeros_like(b_V)
    inside_M = ((target_M >= 0) & (target_M < w_VD.shape[0])).to(lse_M.dtype)
    for rows in _chunks(h_MD.shape[0], chunk_size):
        d_loss_C1 = d_loss_M[rows].unsqueeze(1)
        if probabilities_MV is None:
            d_CV = _logits(h_MD[rows], w_VD, b_V).sub_(lse_M[rows].unsqueeze(1)).exp_().mul_(d_loss_C1)
        else:
            d_CV = probabilities_MV[rows] * d_loss_C1
        index_C1 = target_M[rows].clamp(0, w_VD.shape[0] - 1).unsqueeze(1)
        d_CV.scatter_add_(1, index_C1, -d_loss_C1 * inside_M[rows].unsqueeze(1))
        d_logits_CV = d_CV.to(h_MD.dtype)
        torch.mm(d_logits_CV, w_VD, out=dh_MD[rows])
        dw_VD.addmm_(d_logits_CV.t(), h_MD[rows])
        db_V.add_(d_logits_CV.sum(0))
    return dh_MD, dw_VD, db_V


def _logits(h_MD: Tensor, w_VD: Tensor, b_V: Tensor) -> Tensor:
    return F.linear(h_MD, w_VD, b_V).to(_loss_dtype(h_MD))


def _loss_dtype(h_MD: Tensor) -> torch.dtype:
    """float32 for half precision; float32 and float64 stay as they are."""
    return torch.promote_types(h_MD.dtype, torch.float32)


def _chunks(num_rows: int, chunk_size: int | None) -> list[slice]:
    if chunk_size is None:
        return [slice(0, num_rows)]
    return [slice(start, min(start + chunk_size, num_rows)) for start in range(0, num_rows, chunk_size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_MD: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        target_M: Tensor,
        chunk_size: int | None,
        reduce: Callable[[Partials], Partials] | None,
    ) -> Tensor:
        own, kept_MV = cross_entropy_partials(h_MD, w_VD, b_V, target_M, chunk_size)
        joined = own if reduce is None else reduce(own)
        lse_M = joined.largest + joined.total.log()
        if kept_MV is not None:
            kept_MV.mul_((own.largest - lse_M).exp().unsqueeze(1))
        # The parameters themselves, not views or casts: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(h_MD, w_VD, b_V, target_M, lse_M, kept_MV)
        ctx.chunk_size = chunk_size
        return lse_M - joined.target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss_M: Tensor) -> tuple[Tensor | None, ...]:
        h_MD, w_VD, b_V, target_M, lse_M, kept_MV = ctx.saved_tensors
        gradients = cross_entropy_gradients(h_MD, w_VD, b_V, target_M, lse_M, d_loss_M, ctx.chunk_size, kept_MV)
        return (*gradients, None, None, None)
