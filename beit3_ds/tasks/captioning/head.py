"""Predicts the words of captions, with the masked language modeling head (paper section 3.1)."""

# M rows at masked tokens, D hidden, V vocabulary.

from typing import Any

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model import Head
from beit3_ds.parallel import TensorParallel, VocabParallelHead

TARGET_IDS = "target_ids"
"""Key of the original ids at the masked tokens, (M,) int64."""


class CaptionHead(Head):
    """Predicts masked tokens of captions; the vocabulary is split over the tensor-parallel group.

    The batch's head rows are masked tokens of captions in training, and the rows of the next words in generation.
    """

    def __init__(
        self, config: ModelConfig, tensor: TensorParallel | None = None, *, label_smoothing: float = 0.0
    ) -> None:
        """Builds the head with uninitialised parameters.

        Args:
            config: the model's sizes.
            tensor: the tensor-parallel group; None is a group of this process alone.
            label_smoothing: probability that the labels give to all words but the right one together.
        """
        super().__init__()
        self.mlm = VocabParallelHead(
            config.hidden_size,
            config.text_vocab_size,
            config.cross_entropy_chunk_size,
            tensor or TensorParallel(),
            label_smoothing,
        )

    @property
    def word_table(self) -> VocabParallelHead:
        """Returns the layer whose matrix may be the word table."""
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
            The sums over tokens, or the logits, (M, V).
        """
        if not with_loss:
            return self.mlm.logits(h_MD)
        losses = self.mlm(h_MD, batch.targets[TARGET_IDS])
        return torch.stack([losses.loss.sum(), losses.correct.sum().float()])
