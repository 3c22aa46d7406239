"""Defines the output of a head whose loss compares all samples of a step, as a contrastive loss does."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class StepFeatures(NamedTuple):
    """Holds the features of one micro-batch or of a whole step.

    The loss terms are computed from these values only, so gradients reach the model only through them.
    """

    rows: dict[str, Tensor]
    """Tensors by name, each with one row per sample: features, or integers such as ids, which get no gradient. For a
    whole step, the rows of all micro-batches and ranks are concatenated."""
    shared: dict[str, Tensor]
    """Float tensors by name that depend only on parameters, such as a temperature. They are equal in all micro-batches
    and on all ranks. Each must be a new tensor, because ZeRO-3 partitions a parameter again after the forward pass."""

    def take(self, kept: slice) -> "StepFeatures":
        """Returns features with only the rows `kept` of each tensor, and with all shared values."""
        return StepFeatures({name: x[kept] for name, x in self.rows.items()}, self.shared)


StepLoss = Callable[[StepFeatures], Tensor]
"""Type of a differentiable function from the features of a whole step to the sum of each loss term, float32."""
