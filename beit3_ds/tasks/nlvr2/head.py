"""Defines the head that decides whether a statement is true of two images, as the reference's NLVR2 model does."""

# S samples, P = 2 S pairs, M = 2 P rows, D hidden.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel

LABELS = "labels"
"""Key in `PackedBatch.targets` of the labels, (samples,) int64: 1 for a true statement, 0 for a false one."""


class StatementHead(Head):
    """Decides whether a statement is true of its two images (paper section 3.1).

    Pair 2 i of a batch is the left image of sample i with the statement; pair 2 i + 1 is the right image with the
    statement. The head concatenates the image's CLS row and the text's BOS row of both pairs, 4 times the hidden size.
    It applies LayerNorm, a linear layer to 2 times the hidden size, LayerNorm, GELU, and a linear layer to two classes.
    Every tensor-parallel rank has the whole head and computes the same logits. The batch's head rows are the first rows
    of its pairs' images and texts (`SequenceLayout.first_rows`).
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
        """Returns the sums of two terms, (2,) float32, or the logits of the classes "false" and "true".

        The first term is the cross entropy. The second term is the number of correct answers; it has no gradient.

        Args:
            h_MD: CLS rows of the images of all pairs, then BOS rows of their texts, (2 * pairs, hidden size).
            batch: the packed micro-batch, with `LABELS` if `with_loss`.
            with_loss: True returns the sums, False the logits.

        Returns:
            The sums over samples, or the logits, (samples, 2) float32.
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
