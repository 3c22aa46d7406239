"""Defines the output of heads whose loss compares all samples of a step, such as a contrastive loss."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class StepFeatures(NamedTuple):
    """Holds the features of one micro-batch or of a whole step, for a loss that compares all samples of the step.

    The loss depends on the model only through these tensors.
    """

    rows: dict[str, Tensor]
    """Tensors with one row per sample, by name. A tensor has features, or integers without gradient, such as ids. For a
    whole step, the rows of all micro-batches and ranks are concatenated."""
    shared: dict[str, Tensor]
    """Float tensors, by name, such as a temperature. They depend only on parameters, and are equal in all micro-batches
    and on all ranks. No parameter may be stored here, because ZeRO-3 partitions parameters again after the forward
    pass."""

    def take(self, kept: slice) -> "StepFeatures":
        """Returns features that contain only the samples in `kept`; `shared` is unchanged."""
        return StepFeatures({name: x[kept] for name, x in self.rows.items()}, self.shared)


StepLoss = Callable[[StepFeatures], Tensor]
"""Differentiable function that takes the features of a whole step, and returns the step's sum of each loss term,
(terms,) float32."""
