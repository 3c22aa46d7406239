"""Linear layer and cross entropy over a large vocabulary, in chunks of rows so that full logits never exist."""

# M rows, D width, V vocabulary, C rows of one chunk.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_cross_entropy_reference(h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch with full logits."""
    return F.cross_entropy(_logits(h_MD, w_VD, b_V), target_M, reduction="none")


def linear_cross_entropy(h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, chunk_size: int) -> Tensor:
    """Cross entropy of every row against its target, recomputing each chunk's logits in the backward pass.

    At most `chunk_size` x V logits exist at a time, in float32 (float64 for float64 input).

    Args:
        h_MD: rows; zero rows are allowed and give zero gradients.
        w_VD: output matrix, saved for the backward pass as it is.
        b_V: output bias.
        target_M: int64 in [0, V).
        chunk_size: rows C of a chunk.

    Returns:
        The loss of every row, (M,) float32.
    """
    return _LinearCrossEntropy.apply(h_MD, w_VD, b_V, target_M, chunk_size)


def cross_entropy_partials(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the largest logit, the sum of exp(logit - largest) and the target's logit.

    With w and b a shard of the vocabulary these are what a vocabulary-parallel loss reduces over ranks (maximum,
    rescaled sum, sum); with the whole vocabulary the loss is log(sum) + max - target.

    Args:
        target_M: index into this shard; a row whose target lies outside it ([0, V)) contributes 0 as target logit.

    Returns:
        Three (M,) float32 tensors.
    """
    max_M, sum_M, target_logit_M = (h_MD.new_zeros(len(h_MD), dtype=_loss_dtype(h_MD)) for _ in range(3))
    inside_M = (target_M >= 0) & (target_M < w_VD.shape[0])
    for rows in _chunks(h_MD.shape[0], chunk_size):
        logits_CV = _logits(h_MD[rows], w_VD, b_V)
        index_C1 = target_M[rows].clamp(0, w_VD.shape[0] - 1).unsqueeze(1)
        target_logit_M[rows] = logits_CV.gather(1, index_C1).squeeze(1) * inside_M[rows]
        max_M[rows] = logits_CV.amax(1)
        sum_M[rows] = logits_CV.sub_(max_M[rows].unsqueeze(1)).exp_().sum(1)
    return max_M, sum_M, target_logit_M


def cross_entropy_gradients(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, lse_M: Tensor, d_loss_M: Tensor, chunk_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for rows, matrix and bias, given the log-sum-exp over the whole vocabulary.

    Args:
        lse_M: log(sum exp(logits)) of every row, float32.
        d_loss_M: gradient of every row's loss, float32.

    Returns:
        dh_MD (partial if w is a shard of the vocabulary), dw_VD and db_V.
    """
    dh_MD, dw_VD, db_V = torch.empty_like(h_MD), torch.zeros_like(w_VD), torch.zeros_like(b_V)
    inside_M = ((target_M >= 0) & (target_M < w_VD.shape[0])).to(lse_M.dtype)
    for rows in _chunks(h_MD.shape[0], chunk_size):
        p_CV = _logits(h_MD[rows], w_VD, b_V).sub_(lse_M[rows].unsqueeze(1)).exp_()
        index_C1 = target_M[rows].clamp(0, w_VD.shape[0] - 1).unsqueeze(1)
        p_CV.scatter_add_(1, index_C1, -inside_M[rows].unsqueeze(1))
        d_logits_CV = p_CV.mul_(d_loss_M[rows].unsqueeze(1)).to(h_MD.dtype)
        torch.mm(d_logits_CV, w_VD, out=dh_MD[rows])
        dw_VD.addmm_(d_logits_CV.t(), h_MD[rows])
        db_V.add_(d_logits_CV.sum(0))
    return dh_MD, dw_VD, db_V


def _logits(h_MD: Tensor, w_VD: Tensor, b_V: Tensor) -> Tensor:
    return F.linear(h_MD, w_VD, b_V).to(_loss_dtype(h_MD))


def _loss_dtype(h_MD: Tensor) -> torch.dtype:
    """float32 for half precision; float32 and float64 stay as they are."""
    return torch.promote_types(h_MD.dtype, torch.float32)


def _chunks(num_rows: int, chunk_size: int) -> list[slice]:
    return [slice(start, min(start + chunk_size, num_rows)) for start in range(0, num_rows, chunk_size)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, chunk_size: int) -> Tensor:
        max_M, sum_M, target_logit_M = cross_entropy_partials(h_MD, w_VD, b_V, target_M, chunk_size)
        lse_M = max_M + sum_M.log()
        # The parameters themselves, not views or casts: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(h_MD, w_VD, b_V, target_M, lse_M)
        ctx.chunk_size = chunk_size
        return lse_M - target_logit_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss_M: Tensor) -> tuple[Tensor | None, ...]:
        h_MD, w_VD, b_V, target_M, lse_M = ctx.saved_tensors
        gradients = cross_entropy_gradients(h_MD, w_VD, b_V, target_M, lse_M, d_loss_M, ctx.chunk_size)
        return (*gradients, None, None)
