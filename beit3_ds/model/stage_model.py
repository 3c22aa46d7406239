"""Defines the interface of a model that the schedule and the engine use, for every task."""

# T packed rows, K terms.

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.parallel import VocabParallelHead


class LossOutput(NamedTuple):
    """Holds the loss of one micro-batch."""

    total: Tensor
    """Weighted sum to differentiate, float32 scalar."""
    sums: Tensor
    """Sum of each of the task's terms, (K,) float32, detached."""


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
        """Runs one micro-batch through all layers, or through consecutive layers.

        Args:
            batch: the packed micro-batch, with targets if `loss_factors` is given.
            loss_factors: factor of the sum of each term, (K,) float32: weight / count of the whole step. None returns
                predictions.
            x_TD: the stream before `layers`; None if `layers` begin with the first.
            layers: the layers to run; None is all of them.

        Returns:
            The stream after `layers`; after the last layer a `LossOutput`, `StepFeatures` or the task's predictions.
        """

    @abstractmethod
    def initialize(self, seed: int) -> None:
        """Fills every parameter with its initial value, a function of the seed and the parameter's name."""

    @property
    def stream_dtype(self) -> torch.dtype:
        """Returns the dtype of the stream that stages exchange."""
        return next(self.parameters()).dtype

    @property
    def stream_size(self) -> int:
        """Returns the width of the stream that stages exchange; 0 for a model that cannot be cut into stages."""
        return 0

    @property
    def owned_table(self) -> nn.Parameter | None:
        """Returns this stage's word table if another stage's head is tied to it; None otherwise."""
        return None

    @property
    def tied_table(self) -> VocabParallelHead | None:
        """Returns the head's layer whose weight is tied to the word table; None if no layer is."""
        return None
