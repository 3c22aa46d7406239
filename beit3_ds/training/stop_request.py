"""SIGTERM ends a run after the step it is in, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from beit3_ds.parallel import Mesh


class StopRequest:
    """Whether any rank was asked to stop; clusters send SIGTERM some time before they kill."""

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self._mesh, self._device = mesh, device
        self._received = self._agreed = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Notes SIGTERM instead of dying of it, until the block ends. Only in a process's main thread.

        Once all agreed to stop, it is ignored from then on: a rank may get its own after all others have stopped, and
        would die of it with its work done, so that the launcher reports a failure.
        """
        before = signal.signal(signal.SIGTERM, self._note)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN if self._agreed else before)

    def agreed(self) -> bool:
        """Whether any rank has received the signal: the same answer on all of them. Sends one integer."""
        received = torch.tensor(int(self._received), device=self._device)
        self._agreed = bool(self._mesh.sum_over_all(received))
        return self._agreed

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
