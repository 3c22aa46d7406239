"""Defines the output of heads whose loss compares the samples of a whole step, such as a contrastive loss."""

# K terms.

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class StepFeatures(NamedTuple):
    """Holds the features of a micro-batch, or those of a whole step.

    The terms of a step are a function of these values alone, so gradients reach the model only through them.
    """

    rows: dict[str, Tensor]
    """Tensors by name, each with one row per sample of its kind: features, or integers such as ids, which get no
    gradient. The rows of micro-batches and ranks are concatenated."""
    shared: dict[str, Tensor]
    """Float tensors by name that depend on parameters alone, such as a temperature; equal in all micro-batches and on
    all ranks. Under ZeRO-3 a parameter cannot be read outside the forward pass, so it must be returned as a new
    tensor."""

    def take(self, kept: slice) -> "StepFeatures":
        """Returns some rows of each tensor, with all shared values."""
        return StepFeatures({name: x[kept] for name, x in self.rows.items()}, self.shared)


StepLoss = Callable[[StepFeatures], Tensor]
"""Differentiable function that maps the features of a whole step to the sum of each term, (K,) float32."""
