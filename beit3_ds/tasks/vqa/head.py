"""Defines a head that scores answers to a question about an image, like the VQAv2 model in Microsoft's BEiT-3 code."""

# P pairs, D hidden, A answers.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel

ANSWER_SCORES = "answer_scores"
"""Key in `PackedBatch.targets`: target score of each answer, (questions, answers) float32 in [0, 1]."""


class Pooler(nn.Module):
    """Applies LayerNorm, a linear layer and tanh to CLS rows."""

    def __init__(self, hidden_size: int, epsilon: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, epsilon)
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, h_PD: Tensor) -> Tensor:
        """Returns the pooled features of CLS rows, (questions, hidden size) -> (questions, hidden size)."""
        pooled_PD: Tensor = self.dense(self.norm(h_PD)).tanh()
        return pooled_PD


class AnswerHead(Head):
    """Scores every answer from the image's CLS row, which has attended to the question (paper section 3.1).

    The layers are a pooler, a linear layer to 2 times the hidden size, LayerNorm, GELU, and a linear layer to the
    answers. `SequenceLayout.first_rows` selects the CLS rows. Parameters are replicated on all tensor-parallel ranks,
    which compute equal scores.
    """

    def __init__(self, config: ModelConfig, num_answers: int, tensor: TensorParallel | None = None) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration.
            num_answers: number of answers in the answer list.
            tensor: the tensor-parallel group; unused, because the parameters are replicated.
        """
        super().__init__()
        width = 2 * config.hidden_size
        self.pooler = Pooler(config.hidden_size, config.layer_norm_epsilon)
        self.dense = nn.Linear(config.hidden_size, width)
        self.hidden_norm = nn.LayerNorm(width, config.layer_norm_epsilon)
        self.answers = nn.Linear(width, num_answers)

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns two terms summed over questions, (2,) float32, or the logits, (questions, answers) float32.

        The first term is the binary cross entropy with soft targets, summed over answers. The second term is the target
        score of the answer with the largest logit, without gradient.

        Args:
            h_MD: CLS row of each pair's image, (questions, hidden size).
            batch: the packed micro-batch; needs `ANSWER_SCORES` if `with_loss`.
            with_loss: True returns the terms, False the logits.
        """
        hidden_P = self.hidden_norm(self.dense(self.pooler(h_MD)))
        logits_PA = self.answers(F.gelu(hidden_P)).float()
        if not with_loss:
            return logits_PA
        scores_PA = batch.targets[ANSWER_SCORES]
        loss = F.binary_cross_entropy_with_logits(logits_PA, scores_PA, reduction="sum")
        best_P1 = logits_PA.detach().argmax(1, keepdim=True)
        return torch.stack([loss, scores_PA.gather(1, best_P1).sum()])
