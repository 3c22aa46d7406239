"""Adds label smoothing to a cross entropy over a large vocabulary, without computing all logits.

With smoothing e and V vocabulary entries, the labels give the target the probability 1 - e and every other entry
e / (V - 1). The Kullback-Leibler divergence from these labels is the cross entropy, plus e / (V - 1) times
(V * target logit - sum of all logits), plus a constant. The sum of all logits of a row is the row's product with the
sum of the matrix's rows, so it costs little.
"""

# M rows, D width, V vocabulary, U rows of the matrix in this shard.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelSmoothing(NamedTuple):
    """Describes smoothed labels over a vocabulary; this process may hold only a shard of the vocabulary."""

    probability: float
    """Total probability of all columns other than the target, e; 0 <= e < 1."""
    vocab_size: int
    """Size of the whole vocabulary, V; at least 2."""
    num_own: int
    """Number of rows of this shard's matrix that belong to the vocabulary; the rows after them are padding."""

    @property
    def share(self) -> float:
        """Returns the probability of each column other than the target, e / (V - 1)."""
        return self.probability / (self.vocab_size - 1)

    @property
    def constant(self) -> float:
        """Returns the negative entropy of the labels in nats, the part of the loss that does not depend on logits."""
        if self.probability == 0:
            return 0.0
        return (1 - self.probability) * math.log1p(-self.probability) + self.probability * math.log(self.share)


def smoothed_cross_entropy_reference(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, probability: float
) -> Tensor:
    """Returns the Kullback-Leibler divergence of each row from its smoothed labels, (M,) for M rows.

    Computes it in plain PyTorch from the full logits.
    """
    log_MV = F.log_softmax(F.linear(h_MD, w_VD, b_V).to(torch.promote_types(h_MD.dtype, torch.float32)), dim=1)
    label_MV = torch.full_like(log_MV, probability / (len(w_VD) - 1))
    label_MV.scatter_(1, target_M.unsqueeze(1), 1 - probability)
    return F.kl_div(log_MV, label_MV, reduction="none").sum(1)


def sum_logits(h_MD: Tensor, w_UD: Tensor, b_U: Tensor, smoothing: LabelSmoothing, dtype: torch.dtype) -> Tensor:
    """Returns the sum of each row's logits in this shard, (M,) for M rows; padding does not count."""
    own = slice(0, smoothing.num_own)
    return h_MD.to(dtype) @ w_UD[own].sum(0, dtype=dtype) + b_U[own].sum(dtype=dtype)


def add_smoothing_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    d_loss_M: Tensor,
    smoothing: LabelSmoothing,
) -> None:
    """Adds the gradients of the smoothing term to those of the cross entropy, in place.

    The smoothing term of a row's loss is share * (V * target logit - sum of all logits), for V vocabulary entries.

    Args:
        gradients: gradients of h, w and b in this shard.
        inputs: rows h, matrix w, bias b and the targets. A target is an index into w's rows; an index outside them
            belongs to another shard.
        d_loss_M: gradient of every row's loss.
        smoothing: the labels.
    """
    (dh_MD, dw_UD, db_U), (h_MD, w_UD, _, target_M) = gradients, inputs
    own, dtype = slice(0, smoothing.num_own), d_loss_M.dtype
    if smoothing.num_own == 0:
        return
    all_M = -smoothing.share * d_loss_M
    inside_M = (target_M >= 0) & (target_M < smoothing.num_own)
    index_M = target_M.clamp(0, smoothing.num_own - 1)
    target_weight_M = smoothing.share * smoothing.vocab_size * d_loss_M * inside_M
    h_sum_D = (all_M @ h_MD.to(dtype)).to(dw_UD.dtype)
    # Accumulating index_put_ is deterministic on a GPU too, unlike index_add_.
    dw_UD.index_put_((index_M,), (target_weight_M.unsqueeze(1) * h_MD).to(dw_UD.dtype), accumulate=True)
    db_U.index_put_((index_M,), target_weight_M.to(db_U.dtype), accumulate=True)
    dw_UD[own] += h_sum_D
    db_U[own] += all_M.sum().to(db_U.dtype)
    dh_MD += (target_weight_M.unsqueeze(1) * w_UD[index_M] + torch.outer(all_M, w_UD[own].sum(0, dtype=dtype))).to(
        dh_MD.dtype
    )
