"""Defines the model interface of the pipeline schedule and the engine, common to all tasks."""

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
            loss_factors: factor on the sum of each loss term, float32: the term's weight divided by its count in the
                whole step (`training.loss.build_loss_factors`). None returns predictions instead of a loss.
            x_TD: residual stream before `layers`; None if `layers` starts with the first layer.
            layers: layers to run; None runs all layers.

        Returns:
            The residual stream after `layers`. If the last layer is run, a `LossOutput`, `StepFeatures` or the task's
            predictions instead.
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
    def owned_table(self) -> nn.Parameter | None:
        """Returns the word embedding if it is tied to the head's weight and on this stage, and None otherwise."""
        return None

    @property
    def tied_table(self) -> VocabParallelHead | None:
        """Returns the layer of the head whose weight is the tied word embedding, or None if this stage has none."""
        return None
