"""Defines the captioning head, a masked language modeling head (paper section 3.1)."""

# M rows, one per token to predict; D hidden.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head, StepFeatures
from beit3_ds.parallel import TensorParallel, VocabParallelHead

TARGET_IDS = "target_ids"
"""Key in `PackedBatch.targets`: original ids of the masked tokens, (masked tokens,) int64."""
TOKEN_LOSSES = "loss"
"""Key in `StepFeatures.rows`: loss of each masked token, (masked tokens,) float32."""
CORRECT = "correct"
"""Key in `StepFeatures.rows`: 1 if the prediction of a masked token is right, else 0, (masked tokens,) int64."""


class CaptionHead(Head):
    """Predicts tokens of captions; the vocabulary is split over the tensor-parallel group.

    In training, the head reads the rows of the masked tokens. In generation, the head reads the rows that predict the
    next words.
    """

    def __init__(
        self,
        config: ModelConfig,
        tensor: TensorParallel | None = None,
        *,
        label_smoothing: float = 0.0,
        compares_tokens: bool = False,
    ) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's configuration.
            tensor: the tensor-parallel group; None for a group of this process alone.
            label_smoothing: total probability of all wrong words in a smoothed label.
            compares_tokens: whether the head returns the loss of each token instead of the sum, so that the trainer can
                compare all tokens of a step (`sum_best_tokens`).
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
    def word_layer(self) -> VocabParallelHead:
        """Returns the layer that predicts words. The weight of the layer may be tied to the word embedding."""
        return self.mlm

    def forward(self, h_MD: Tensor, batch: PackedBatch, with_loss: bool) -> Any:
        """Returns two terms summed over masked tokens, (2,) float32, or the logits, (rows, vocabulary).

        The first term is the loss, KL(smoothed label || prediction). The second term is the number of right
        predictions, without gradient. If the head was built with `compares_tokens`, the terms are not summed. They are
        returned as `StepFeatures` with the keys `TOKEN_LOSSES` and `CORRECT`.

        Args:
            h_MD: hidden states, (rows, hidden size). With `with_loss`, these are the rows of the masked tokens. In
                generation, these are the rows that predict the next words.
            batch: the packed micro-batch; needs `TARGET_IDS` if `with_loss`.
            with_loss: True returns the terms, False the logits.
        """
        if not with_loss:
            return self.mlm.logits(h_MD)
        losses = self.mlm(h_MD, batch.targets[TARGET_IDS])
        if self.compares_tokens:
            return StepFeatures({TOKEN_LOSSES: losses.loss, CORRECT: losses.correct.long()}, {})
        return torch.stack([losses.loss.sum(), losses.correct.sum().float()])


def sum_best_tokens(features: StepFeatures, dropped_share: float) -> Tensor:
    """Returns a step's loss of the best-predicted tokens, and the number of right predictions of all tokens, (2,)
    float32.

    Some captions do not fit their images, so Microsoft's BEiT-3 code drops tokens with large losses late in training.
    That code compares the tokens of one rank's batch. This function compares the tokens of the whole step, so the loss
    does not depend on the layout of ranks.

    Args:
        features: losses of all tokens of a step.
        dropped_share: share of the tokens to drop.

    Returns:
        The loss and the number of right predictions. The loss is the mean over the kept tokens, multiplied by the
        number of all tokens.
    """
    losses_M = features.rows[TOKEN_LOSSES]
    num_kept = int(len(losses_M) * (1 - dropped_share))
    kept = losses_M.sort().values[:num_kept].sum() * (len(losses_M) / max(1, num_kept))
    return torch.stack([kept, features.rows[CORRECT].sum().float()])
