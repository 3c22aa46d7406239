"""Predicts the words of captions, with the masked language modeling head (paper section 3.1)."""

# M rows at masked tokens, D hidden, V vocabulary.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head, StepFeatures
from beit3_ds.parallel import TensorParallel, VocabParallelHead

TARGET_IDS = "target_ids"
"""Key of the original ids at the masked tokens, (M,) int64."""
TOKEN_LOSSES = "loss"
"""Name of the losses of tokens in `StepFeatures.rows`, (M,) float32."""
CORRECT = "correct"
"""Name of the numbers of right predictions of tokens in `StepFeatures.rows`, 0 or 1, (M,) int64."""


class CaptionHead(Head):
    """Predicts masked tokens of captions; the vocabulary is split over the tensor-parallel group.

    The batch's head rows are masked tokens of captions in training, and the rows of the next words in generation.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        *,
        label_smoothing: float = 0.0,
        compares_tokens: bool = False,
    ) -> None:
        """Builds the layers of the head, with uninitialised parameters.

        Args:
            config: the model's sizes.
            tensor: the tensor-parallel group; None is a group of this process alone.
            label_smoothing: total probability that the labels give to all wrong words.
            compares_tokens: whether the loss compares the tokens of a step, as `sum_best_tokens` does. The head then
                returns the losses of single tokens.
        """
        super().__init__()
        self.compares_tokens = compares_tokens
        self.mlm = VocabParallelHead(
            config.hidden_size,
            config.text_vocab_size,
            config.cross_entropy_chunk_size,
            tensor or TensorParallel(),
            label_smoothing,
        )

    @property
    def word_table(self) -> VocabParallelHead:
        """Returns the output layer, whose matrix may be shared with the word embedding."""
        return self.mlm

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns the sums of two terms, (2,) float32, or the logits of words.

        The first term is the divergence from the smoothed labels, the second the number of right predictions, which has
        no gradient.

        Args:
            h_MD: rows of tokens, (M, D).
            batch: the packed micro-batch, with `TARGET_IDS` if `with_loss`.
            with_loss: whether to return the sums.

        Returns:
            The sums over tokens, or `StepFeatures` with `TOKEN_LOSSES` and `CORRECT` if the loss compares tokens, or
            the logits, (M, V).
        """
        if not with_loss:
            return self.mlm.logits(h_MD)
        losses = self.mlm(h_MD, batch.targets[TARGET_IDS])
        if self.compares_tokens:
            return StepFeatures({TOKEN_LOSSES: losses.loss, CORRECT: losses.correct.long()}, {})
        return torch.stack([losses.loss.sum(), losses.correct.sum().float()])


def sum_best_tokens(features: StepFeatures, dropped_share: float) -> Tensor:
    """Returns the sums of both terms over a step without the tokens of the largest losses, (2,) float32.

    The reference drops the worst tokens late in training, because some captions do not fit their image. It compares
    the tokens of one rank's batch; this compares those of the whole step, so no layout changes the loss.

    Args:
        features: losses of all tokens of a step.
        dropped_share: share of the tokens to drop. The loss of the others is scaled, so that dividing it by the number
            of all tokens gives their mean.
    """
    losses_M = features.rows[TOKEN_LOSSES]
    num_kept = int(len(losses_M) * (1 - dropped_share))
    kept = losses_M.sort().values[:num_kept].sum() * (len(losses_M) / max(1, num_kept))
    return torch.stack([kept, features.rows[CORRECT].sum().float()])
