"""Finds the micro-batches with non-finite gradients on this rank."""

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientProbe:
    """Sums the elements of each gradient when the gradient is computed, before it is accumulated or reduced over ranks.

    A NaN or infinity in a gradient makes the sum non-finite, which identifies the rank and the micro-batch. The sums
    stay on the device until `find_non_finite` is called. The probe reads each gradient once and does not communicate.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        self._current: list[Tensor] = []

    def watch(self, leaves: Iterable[Tensor]) -> None:
        """Registers hooks that sum the elements of each leaf tensor's gradient.

        Hooks run in the order of registration. Therefore, call this method first, and only then register hooks that
        change the gradient.
        """
        for leaf in leaves:
            leaf.register_hook(self._note)

    def begin_step(self) -> None:
        """Clears the sums of the previous step."""
        self._sums = {}

    def begin_backward(self, micro_batch: int) -> None:
        """Assigns the gradients of the next backward pass to a micro-batch.

        Args:
            micro_batch: index of the micro-batch within the step.
        """
        self._current = self._sums.setdefault(micro_batch, [])

    def find_non_finite(self) -> list[int]:
        """Returns the indices of the last step's micro-batches that have a non-finite gradient on this rank."""
        return [number for number, sums in self._sums.items() if not torch.stack(sums).isfinite().all()]

    def _note(self, gradient: Tensor) -> None:
        self._current.append(gradient.detach().sum(dtype=torch.float32))
