"""Finds the micro-batches whose gradients are not finite on this rank."""

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientProbe:
    """Sums every gradient when it is computed, before it is accumulated or reduced over ranks.

    A NaN in a gradient makes its sum NaN, so the probe can name the rank and the micro-batch. The sums stay on the
    device until `find_non_finite`. The probe reads each gradient once and sends nothing.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        self._current: list[Tensor] = []

    def watch(self, leaves: Iterable[Tensor]) -> None:
        """Registers on every leaf tensor a hook that sums its gradient; hooks registered later run after this hook."""
        for leaf in leaves:
            leaf.register_hook(self._note)

    def begin_step(self) -> None:
        """Clears the sums of the previous step."""
        self._sums = {}

    def begin_backward(self, micro_batch: int) -> None:
        """Sets the index of the micro-batch, within the step, to which the next backward pass belongs."""
        self._current = self._sums.setdefault(micro_batch, [])

    def find_non_finite(self) -> list[int]:
        """Returns the micro-batches of the last step that have a non-finite gradient on this rank."""
        return [number for number, sums in self._sums.items() if not torch.stack(sums).isfinite().all()]

    def _note(self, gradient: Tensor) -> None:
        self._current.append(gradient.detach().sum(dtype=torch.float32))
