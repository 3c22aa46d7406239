"""Defines the model interface that the pipeline schedule and the engine use for every task."""

# T packed rows, D hidden.

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.parallel import VocabParallelHead


class LossOutput(NamedTuple):
    """Holds the loss of one micro-batch and the sums of its terms."""

    total: Tensor
    """Loss to differentiate: the sum of all terms times their loss factors, float32 scalar."""
    sums: Tensor
    """Sum of each of the task's terms, one float32 per term, detached."""


class StageModel(nn.Module, ABC):
    """Holds the layers of one pipeline stage; a model without a pipeline is one stage."""

    @abstractmethod
    def forward(
        self,
        batch: PackedBatch,
        loss_factors: Tensor | None,
        x_TD: Tensor | None = None,
        layers: range | None = None,
    ) -> Any:
        """Runs one micro-batch through all layers, or through the consecutive layers `layers`.

        Args:
            batch: the packed micro-batch, with targets if `loss_factors` is given.
            loss_factors: factor by which the sum of each loss term is multiplied, float32: the term's weight divided by
                its count in the whole step (`training.loss.build_loss_factors`). None returns predictions.
            x_TD: the stream before `layers`; None if `layers` begins with the first layer.
            layers: the layers to run; None runs all layers.

        Returns:
            The stream after `layers`; after the last layer a `LossOutput`, `StepFeatures` or the task's predictions.
        """

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Fills every parameter with its initial value, which depends only on the seed and the parameter's name."""

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the residual stream that pipeline stages exchange."""
        return next(self.parameters()).dtype

    @property
    def stream_size(self) -> int:
        """Returns the width of the residual stream; 0 for a model that cannot be cut into pipeline stages."""
        return 0

    @property
    def owned_table(self) -> nn.Parameter | None:
        """Returns the tied word table if this stage holds the embeddings; None otherwise."""
        return None

    @property
    def tied_table(self) -> VocabParallelHead | None:
        """Returns the layer of this stage's head whose weight is tied to the word table; None if there is none."""
        return None
