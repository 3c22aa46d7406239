"""Defines the head that predicts the words of captions: a masked language modeling head (paper section 3.1)."""

# M rows, one per token to predict; D hidden.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head, StepFeatures
from beit3_ds.parallel import TensorParallel, VocabParallelHead

TARGET_IDS = "target_ids"
"""Key in `PackedBatch.targets` of the original ids of the masked tokens, (masked tokens,) int64."""
TOKEN_LOSSES = "loss"
"""Key in `StepFeatures.rows` of the loss of each masked token, (masked tokens,) float32."""
CORRECT = "correct"
"""Key in `StepFeatures.rows` of whether each prediction is right, 0 or 1, (masked tokens,) int64."""


class CaptionHead(Head):
    """Predicts masked tokens of captions; the vocabulary is split over the tensor-parallel group.

    In training, the batch's head rows are the masked tokens of captions. In generation, they are the rows that predict
    the next words.
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
            compares_tokens: whether the loss depends on the losses of all tokens of a step, as in `sum_best_tokens`.
                The head then returns the loss of each token instead of their sum.
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

        The first term is the loss, KL(smoothed label || prediction). The second term is the number of right
        predictions, which has no gradient.

        Args:
            h_MD: rows of the masked tokens, (masked tokens, hidden size).
            batch: the packed micro-batch, with `TARGET_IDS` if `with_loss`.
            with_loss: True returns the sums, False the logits.

        Returns:
            Without `with_loss`, the logits, (masked tokens, vocabulary). With `with_loss`, the sums over tokens, or, if
            `compares_tokens`, `StepFeatures` with `TOKEN_LOSSES` and `CORRECT`.
        """
        if not with_loss:
            return self.mlm.logits(h_MD)
        losses = self.mlm(h_MD, batch.targets[TARGET_IDS])
        if self.compares_tokens:
            return StepFeatures({TOKEN_LOSSES: losses.loss, CORRECT: losses.correct.long()}, {})
        return torch.stack([losses.loss.sum(), losses.correct.sum().float()])


def sum_best_tokens(features: StepFeatures, dropped_share: float) -> Tensor:
    """Returns a step's loss, summed without the tokens of largest loss, and its number of right predictions.

    The reference drops these tokens late in training, because some captions do not fit their image. The reference
    compares the tokens of one rank's batch. This function compares the tokens of the whole step, so the loss does not
    depend on the layout.

    Args:
        features: losses of all tokens of a step.
        dropped_share: share of the tokens to drop. The sum over the kept tokens is scaled, so that dividing it by the
            number of all tokens gives the mean over the kept tokens.

    Returns:
        Both numbers, (2,) float32. The right predictions include those of dropped tokens.
    """
    losses_M = features.rows[TOKEN_LOSSES]
    num_kept = int(len(losses_M) * (1 - dropped_share))
    kept = losses_M.sort().values[:num_kept].sum() * (len(losses_M) / max(1, num_kept))
    return torch.stack([kept, features.rows[CORRECT].sum().float()])
