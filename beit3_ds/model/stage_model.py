"""Defines the model interface that the pipeline schedule and the engine use for all tasks."""

# T packed rows, D hidden.

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.parallel import VocabParallelHead


class LossOutput(NamedTuple):
    """Holds the loss of one micro-batch and the sum of each loss term."""

    total: Tensor
    """Loss to differentiate: the sum of all terms, each multiplied by its loss factor; float32 scalar."""
    sums: Tensor
    """Sum of each loss term, one float32 per term, detached."""


class StageModel(nn.Module, ABC):
    """Holds the layers of one pipeline stage. Without a pipeline, the whole model is one stage."""

    @abstractmethod
    def forward(
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> Any:
        """Runs one micro-batch through all layers, or through the consecutive layers in `layers`.

        Args:
            batch: the packed micro-batch, including targets if `loss_factors` is given.
            loss_factors: one float32 factor per loss term, which multiplies the term's sum over the micro-batch
                (`training.loss.build_loss_factors`). None returns predictions instead of a loss.
            x_TD: residual stream before `layers`; None if `layers` starts with the first layer.
            layers: layers to run; None runs all layers.

        Returns:
            Without the last layer, the residual stream after `layers`. With the last layer, the task's predictions if
            `loss_factors` is None, and a `LossOutput` otherwise. For a loss that compares samples with each other,
            `StepFeatures` instead of a `LossOutput`.
        """

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Fills each parameter with its initial value, which depends only on the seed and the parameter's name."""

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the residual stream that pipeline stages exchange."""
        return next(self.parameters()).dtype

    @property
    def stream_size(self) -> int:
        """Returns the width of the residual stream, or 0 for a model that cannot be divided into pipeline stages."""
        return 0

    @property
    def tied_embedding(self) -> nn.Parameter | None:
        """Returns the word embedding if it is tied to the head's weight and this stage holds it, and None otherwise."""
        return None

    @property
    def tied_word_layer(self) -> VocabParallelHead | None:
        """Returns the head's layer that uses the tied word embedding as its weight; None if this stage has no such
        layer.
        """
        return None
