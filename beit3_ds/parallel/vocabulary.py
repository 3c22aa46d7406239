"""Provides an embedding and a cross-entropy head whose vocabulary is split over tensor-parallel ranks."""

# S tokens, M rows, D hidden, V rows of this rank's part of the vocabulary, padding included.

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.kernels.ops.embedding import embedding
from beit3_ds.kernels.ops.label_smoothing import LabelSmoothing
from beit3_ds.kernels.ops.linear_cross_entropy import Partials, linear_cross_entropy
from beit3_ds.parallel.tensor import TensorParallel, split_parameter

PADDING_BIAS = -1e4
"""Bias of a head's padding rows, whose weights are 0.

The value fits in half precision. Padding rows add exactly 0 to the cross entropy and get no gradient.
"""


class VocabParallelEmbedding(nn.Module):
    """Looks up embeddings in a table whose rows are split over tensor-parallel ranks.

    The forward pass all-reduces the embeddings of all tokens, and the backward pass does not communicate. The
    constructor sets the padding rows of `weight` to 0, and initializes no other rows.
    """

    def __init__(self, vocab_size: int, hidden_size: int, tensor: TensorParallel) -> None:
        super().__init__()
        self.tensor, self.split = tensor, tensor.split_vocabulary(vocab_size)
        self.weight = split_parameter(self.split, vocab_size, hidden_size)

    def forward(self, ids_S: Tensor) -> Tensor:
        """Returns the embedding of each int64 token id, (tokens, hidden size)."""
        if self.tensor.size == 1:
            return embedding(ids_S, self.weight)
        local_S = ids_S - self.split.start
        absent_S = (local_S < 0) | (ids_S >= self.split.stop)
        rows_SD = embedding(local_S.masked_fill(absent_S, 0), self.weight)
        return self.tensor.reduce_from(rows_SD.masked_fill(absent_S.unsqueeze(1), 0))


class RowLosses(NamedTuple):
    """Holds the loss of each row, and whether each row's prediction is correct."""

    loss: Tensor
    """Cross entropy of each row, possibly with label smoothing, float32."""
    correct: Tensor
    """Whether the target has the largest logit of its row, bool."""


class VocabParallelHead(nn.Module):
    """Computes logits or cross entropies over a vocabulary that is split over tensor-parallel ranks.

    The constructor sets the weights of padding rows to 0 and their biases to `PADDING_BIAS`, and initializes no other
    rows.
    """

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        chunk_size: int | None,
        tensor: TensorParallel,
        label_smoothing: float = 0.0,
    ) -> None:
        """Builds the linear layer from rows to logits.

        Args:
            hidden_size: number of features D of an input row.
            vocab_size: size of the whole vocabulary.
            chunk_size: maximum number of rows whose logits are in memory at the same time. None keeps all logits for
                the backward pass, which is faster for small vocabularies.
            tensor: the tensor-parallel group.
            label_smoothing: total probability of all labels other than the target; 0 disables label smoothing.
        """
        super().__init__()
        self.label_smoothing = label_smoothing
        self.tensor, self.split, self.chunk_size = tensor, tensor.split_vocabulary(vocab_size), chunk_size
        self.weight = split_parameter(self.split, vocab_size, hidden_size)
        self.bias = split_parameter(self.split, vocab_size, padding_value=PADDING_BIAS)

    def tie_weight(self, weight: nn.Parameter | None) -> None:
        """Replaces the weight matrix, so that this layer and the word embedding have equal weights.

        Args:
            weight: the word embedding's parameter, which becomes this layer's weight. None on a pipeline stage without
                the word embedding. This layer's weight then becomes an uninitialised buffer outside of the state dict,
                and the first stage sends the embedding's values to the buffer (`pipeline.tied`).
        """
        own = self.weight
        del self.weight
        if weight is None:
            self.register_buffer("weight", torch.empty_like(own, requires_grad=False), persistent=False)
        else:
            self.weight = weight

    def forward(self, h_MD: Tensor, target_M: Tensor) -> RowLosses:
        """Returns the loss of each row, and whether each prediction is correct. The results are equal on all ranks.

        The forward pass all-reduces three floats per row, or four with label smoothing. The backward pass all-reduces
        the gradient of the rows.

        Args:
            h_MD: input rows, equal on all ranks.
            target_M: target of each row, int64 in [0, vocabulary).
        """
        joined: list[Partials] = []

        def reduce(partials: Partials) -> Partials:
            joined.append(self._reduce(partials))
            return joined[0]

        h_MD, target_M = self.tensor.copy_to(h_MD), target_M - self.split.start
        smoothing = None
        if self.label_smoothing:
            smoothing = LabelSmoothing(self.label_smoothing, self.split.size, self.split.stop - self.split.start)
        loss_M = linear_cross_entropy(h_MD, self.weight, self.bias, target_M, self.chunk_size, reduce, smoothing)
        return RowLosses(loss_M, joined[0].target_logit >= joined[0].largest)

    def logits(self, h_MD: Tensor) -> Tensor:
        """Returns each row's logits over the whole vocabulary, (rows, vocabulary), on all ranks.

        All-reduces all logits. Use this method only for predictions: the backward pass would not reduce gradients.
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
        summed = [rescaled_M, partials.target_logit]
        summed += [] if partials.logit_sum is None else [partials.logit_sum]
        return Partials(largest_M, *self.tensor.all_reduce(torch.stack(summed)))
