"""Computes an exponential moving average of the weights that one rank owns (Polyak and Juditsky, 1992)."""

from collections.abc import Sequence

import torch
from torch import Tensor


class WeightAverage:
    """Exponential moving average, in float32, of the tensors that the optimizer updates on this rank.

    Communicates nothing: under every layout and ZeRO stage, each rank averages only the elements that it owns.
    """

    def __init__(self, decay: float, weights: Sequence[Tensor]) -> None:
        """Starts the averages at the current weights.

        Args:
            decay: weight of the old average in each update.
            weights: float32 tensors that the optimizer updates. The other methods must get these tensors in the same
                order.
        """
        self._decay = decay
        self.tensors = [weight.detach().clone() for weight in weights]
        """Float32 averages, in the order and shapes of the weights."""

    @torch.no_grad()
    def update(self, weights: Sequence[Tensor]) -> None:
        """Updates the averages with the current weights: average = decay * average + (1 - decay) * weight."""
        torch._foreach_lerp_(self.tensors, list(weights), 1 - self._decay)

    @torch.no_grad()
    def restart(self, weights: Sequence[Tensor]) -> None:
        """Sets the averages to the current weights."""
        for average, weight in zip(self.tensors, weights, strict=True):
            average.copy_(weight)

    @torch.no_grad()
    def swap(self, weights: Sequence[Tensor]) -> None:
        """Swaps averages and weights in place and exactly; needs extra memory for one tensor."""
        for average, weight in zip(self.tensors, weights, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)
