"""An embedding and a cross entropy whose vocabulary the tensor-parallel ranks divide."""

# S tokens, M rows, D hidden, V rows of this rank's part of the vocabulary, padding included.

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.kernels.ops.embedding import embedding
from beit3_ds.kernels.ops.linear_cross_entropy import Partials, linear_cross_entropy
from beit3_ds.parallel.tensor import TensorParallel, split_parameter

PADDING_BIAS = -1e4
"""The bias of the heads' padding rows, whose weights are 0. It lies so far below real logits that exp of the difference
is exactly 0, and within the range of half precision: padding adds nothing to the cross entropy, its gradients are
exactly 0, and AdamW leaves it as it is, since biases do not decay."""


class VocabParallelEmbedding(nn.Module):
    """A table of which every rank holds some rows; the parameter `weight` is left uninitialised, its padding is 0.

    Forward all-reduces S * D elements; backward sends nothing.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor, self.split = tensor, tensor.split_vocabulary(vocab_size)
        self.weight = split_parameter(self.split, vocab_size, hidden_size)

    def forward(self, ids_S: Tensor) -> Tensor:
        """Looks up tokens, (S,) int64 in [0, vocabulary) -> (S, D)."""
        if self.tensor.size == 1:
            return embedding(ids_S, self.weight)
        local_S = ids_S - self.split.start
        absent_S = (local_S < 0) | (ids_S >= self.split.stop)
        rows_SD = embedding(local_S.masked_fill(absent_S, 0), self.weight)
        return self.tensor.reduce_from(rows_SD.masked_fill(absent_S.unsqueeze(1), 0))


class VocabParallelHead(nn.Module):
    """A linear layer over a vocabulary, with bias, of which every rank holds some rows, and its cross entropy.

    Parameters are left uninitialised but for their padding, which has logits of `PADDING_BIAS`.
    """

    def __init__(self, hidden_size: int, vocab_size: int, chunk_size: int | None, tensor: TensorParallel) -> None:
        """Builds the head.

        Args:
            hidden_size: D.
            vocab_size: of all ranks together.
            chunk_size: at most this many rows' logits exist at a time; None keeps all for the backward pass, which is
                faster for a small vocabulary.
            tensor: the ranks.
        """
        super().__init__()
        self.tensor, self.split, self.chunk_size = tensor, tensor.split_vocabulary(vocab_size), chunk_size
        self.weight = split_parameter(self.split, vocab_size, hidden_size)
        self.bias = split_parameter(self.split, vocab_size, padding_value=PADDING_BIAS)

    def tie_weight(self, weight: nn.Parameter | None) -> None:
        """Uses another module's parameter as the matrix; None makes it a buffer that is not saved."""
        own = self.weight
        del self.weight
        if weight is None:
            self.register_buffer("weight", torch.empty_like(own, requires_grad=False), persistent=False)
        else:
            self.weight = weight

    def forward(self, h_MD: Tensor, target_M: Tensor) -> Tensor:
        """Every row's cross entropy, the same on all ranks.

        Forward all-reduces 3 * M floats (maximum; sum and target's logit); backward all-reduces M * D elements.

        Args:
            h_MD: rows, the same on all ranks.
            target_M: int64 in [0, vocabulary).

        Returns:
            (M,) float32.
        """
        h_MD, target_M = self.tensor.copy_to(h_MD), target_M - self.split.start
        return linear_cross_entropy(h_MD, self.weight, self.bias, target_M, self.chunk_size, self._reduce)

    def logits(self, h_MD: Tensor) -> Tensor:
        """Every row's logits over the whole vocabulary, on all ranks, without a gradient over ranks: for predictions.

        All-reduces M * vocabulary elements.
        """
        local_MV = F.linear(h_MD, self.weight, self.bias)
        if self.tensor.size == 1:
            return local_MV
        whole = local_MV.new_zeros(len(h_MD), self.split.size)
        whole[:, self.split.start : self.split.stop] = local_MV[:, : self.split.stop - self.split.start]
        return self.tensor.all_reduce(whole)

    def _reduce(self, partials: Partials) -> Partials:
        if self.tensor.size == 1:
            return partials
        largest_M = self.tensor.all_reduce(partials.largest.clone(), dist.ReduceOp.MAX)
        rescaled_M = partials.total * (partials.largest - largest_M).exp()
        total_M, target_M = self.tensor.all_reduce(torch.stack([rescaled_M, partials.target_logit]))
        return Partials(largest_M, total_M, target_M)
