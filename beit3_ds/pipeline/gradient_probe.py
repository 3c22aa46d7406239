"""Which micro-batches gave this rank gradients that are not finite."""

from collections.abc import Iterable

import torch
from torch import Tensor


class GradientProbe:
    """Sums every gradient as it is made, before anything is added to it or it is reduced with those of other ranks.

    A NaN or an infinity makes its sum one. So the rank and the micro-batch can be named, which the gradients' norm
    cannot: by then the gradients of all ranks are added up. The sums stay on the device until somebody asks, which
    happens after a step that was skipped. They cost one reading of each gradient; nothing is sent.
    """

    def __init__(self) -> None:
        self._sums: dict[int, list[Tensor]] = {}
        self._current: list[Tensor] = []

    def watch(self, leaves: Iterable[Tensor]) -> None:
        """Begins to sum the gradients of leaf tensors. Hooks that come later on them see what this one has seen."""
        for leaf in leaves:
            leaf.register_hook(self._note)

    def begin_step(self) -> None:
        """Forgets the step before."""
        self._sums = {}

    def begin_backward(self, micro_batch: int) -> None:
        """Says which micro-batch of the step the next backward pass belongs to."""
        self._current = self._sums.setdefault(micro_batch, [])

    def find_non_finite(self) -> list[int]:
        """The micro-batches of the last step, some gradient of which was not finite on this rank."""
        return [number for number, sums in self._sums.items() if not torch.stack(sums).isfinite().all()]

    def _note(self, gradient: Tensor) -> None:
        self._current.append(gradient.detach().sum(dtype=torch.float32))
