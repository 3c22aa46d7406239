"""Adds label smoothing to the cross entropy over a large vocabulary, without keeping all logits in memory.

With smoothing e and V vocabulary entries, the smoothed labels are probabilities: 1 - e for the target, and e / (V - 1)
for each other entry. The loss is the Kullback-Leibler divergence KL(labels || prediction). The loss has three terms:
the cross entropy, e / (V - 1) * (V * target logit - sum of all logits), and a constant. The sum of all logits of a
hidden state h is computed without the logits. It is h @ w + b, where w is the sum of all rows of the output matrix, and
b is the sum of all biases.
"""

# M rows, D width, V vocabulary, U rows of the matrix in this shard.

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class LabelSmoothing(NamedTuple):
    """Describes smoothed labels over a vocabulary. If ranks divide the vocabulary, this rank holds one shard of the
    vocabulary.
    """

    probability: float
    """Total probability e of all vocabulary entries except the target; 0 <= e < 1."""
    vocab_size: int
    """Number of entries V in the whole vocabulary; at least 2."""
    num_own: int
    """Number of vocabulary entries in this rank's shard. Further rows of the shard's matrix are padding."""

    @property
    def share(self) -> float:
        """Returns the probability of each vocabulary entry except the target: `probability` / (`vocab_size` - 1)."""
        return self.probability / (self.vocab_size - 1)

    @property
    def constant(self) -> float:
        """Returns the constant term of the loss, in nats: the negative entropy of the labels."""
        if self.probability == 0:
            return 0.0
        return (1 - self.probability) * math.log1p(-self.probability) + self.probability * math.log(self.share)


def smoothed_cross_entropy_reference(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, probability: float
) -> Tensor:
    """Computes in plain PyTorch each row's cross entropy with smoothed labels, minus the labels' entropy, (M,).

    This difference is the Kullback-Leibler divergence KL(labels || prediction).
    """
    log_MV = F.log_softmax(F.linear(h_MD, w_VD, b_V).to(torch.promote_types(h_MD.dtype, torch.float32)), dim=1)
    label_MV = torch.full_like(log_MV, probability / (len(w_VD) - 1))
    label_MV.scatter_(1, target_M.unsqueeze(1), 1 - probability)
    return F.kl_div(log_MV, label_MV, reduction="none").sum(1)


def sum_logits(h_MD: Tensor, w_UD: Tensor, b_U: Tensor, smoothing: LabelSmoothing, dtype: torch.dtype) -> Tensor:
    """Returns the sum of each row's logits over this shard's vocabulary entries, (M,). Leaves out padding."""
    own = slice(0, smoothing.num_own)
    return h_MD.to(dtype) @ w_UD[own].sum(0, dtype=dtype) + b_U[own].sum(dtype=dtype)


def add_smoothing_gradients(
    gradients: tuple[Tensor, Tensor, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    d_loss_M: Tensor,
    smoothing: LabelSmoothing,
) -> None:
    """Adds the gradients of the smoothing term to the gradients of the cross entropy, in place.

    For each row, the smoothing term is e / (V - 1) * (V * target logit - sum of all logits), with smoothing e and V
    vocabulary entries.

    Args:
        gradients: gradients of h, w and b in this shard, from the cross entropy.
        inputs: rows h, matrix w, bias b and targets. A target is a row index of w; an index outside w belongs to
            another shard.
        d_loss_M: gradient of each row's loss.
        smoothing: smoothed labels.
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
