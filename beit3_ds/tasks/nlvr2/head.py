"""Defines the head that decides whether a statement is true of two images, as in the reference's NLVR2 model."""

# S samples, P = 2 S pairs, D hidden.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel

LABELS = "labels"
"""Key of whether each statement is true, (S,) int64, 0 or 1."""


class StatementHead(Head):
    """Classifies a statement from both of its pairs (paper section 3.1).

    Pairs 2 i and 2 i + 1 of a batch hold the two images of sample i, each with the statement. The head reads
    [image CLS, text BOS] of both, 4 D numbers, and applies LayerNorm, a linear layer to 2 D, LayerNorm, GELU, and a
    linear layer to two classes. Every tensor-parallel rank has the whole head and computes the same logits. The batch's
    head rows are the first rows of its pairs' images and texts (`SequenceLayout.first_rows`).
    """

    def __init__(self, config: ModelConfig, tensor: TensorParallel | None = None) -> None:
        """Builds the head.

        Args:
            config: the model's sizes.
            tensor: the tensor-parallel group, which the head does not use: its parameters are replicated.
        """
        super().__init__()
        width = config.hidden_size
        self.input_norm = nn.LayerNorm(4 * width, config.layer_norm_epsilon)
        self.dense = nn.Linear(4 * width, 2 * width)
        self.hidden_norm = nn.LayerNorm(2 * width, config.layer_norm_epsilon)
        self.classes = nn.Linear(2 * width, 2)

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the sums of two terms, (2,) float32, or the logits of false and true.

        The first term is the cross entropy, the second the number of correct answers, which has no gradient.

        Args:
            h_MD: CLS rows of the images of all pairs, then BOS rows of their texts, (2 P, D).
            batch: the packed micro-batch, with `LABELS` if `with_loss`.
            with_loss: whether to return the sums.

        Returns:
            The sums over samples, or the logits, (S, 2) float32.
        """
        assert batch.num_pairs % 2 == 0, f"{batch.num_pairs} pairs, but a sample has two"
        cls_PD, bos_PD = h_MD.tensor_split(2)
        joined_S = torch.cat([cls_PD, bos_PD], dim=1).reshape(-1, 4 * h_MD.shape[1])
        hidden_S = self.hidden_norm(self.dense(self.input_norm(joined_S)))
        logits = self.classes(F.gelu(hidden_S)).float()
        if not with_loss:
            return logits
        labels = batch.targets[LABELS]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss, (logits.argmax(1) == labels).sum().float()])
