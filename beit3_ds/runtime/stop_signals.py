"""SIGTERM, SIGINT and SIGUSR1 end a run after the step it is in, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Literal

import torch

from beit3_ds.parallel import Mesh
from beit3_ds.storage_error import StorageError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Clusters send the first or the last some time before they kill; the second is Ctrl-C."""


class StopSignals:
    """Which of them this process has received."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        """Their numbers."""
        self.are_heeded = False
        """Whether the ranks have agreed to stop because of them."""

    def is_asked_to_stop(self) -> bool:
        """Returns whether any stop signal was received."""
        return bool(self.received)

    @contextmanager
    def listening(self) -> Iterator["StopSignals"]:
        """Notes the signals instead of dying of them, until the block ends. Only in a process's main thread.

        Takes those, too, that were held back until now (`beit3 launch` starts ranks with the signals blocked). A second
        SIGINT ends the process as it always does. Once the ranks have agreed to stop, they are ignored from then on: a
        rank may get its own after all others have stopped, and would die of it with its work done, so that the
        launcher reports a failure.
        """
        before = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.are_heeded else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)


class SharedStopSignals:
    """Tells whether any rank was asked to stop, or has no data to continue with."""

    def __init__(self, signals: StopSignals, mesh: Mesh) -> None:
        self._signals, self._mesh = signals, mesh
        self.reason = ""
        """The signals that any rank had received when they last agreed, by name."""
        self.data_fault: Literal["data", "storage"] | None = None
        """Cause when a rank had no data at the last agreement: its files or workers, or a failing file system."""

    @property
    def must_end(self) -> bool:
        """Whether the run must end after the finished step, for either cause."""
        return bool(self.reason or self.data_fault)

    def agreed(self, data_error: Exception | None = None) -> bool:
        """Returns `must_end`, the same on all ranks. Sends five integers.

        Args:
            data_error: error for which this rank has no data; None if it has.
        """
        faults = [data_error is not None, isinstance(data_error, StorageError)]
        own = [*(number in self._signals.received for number in STOP_SIGNALS), *faults]
        *received, failed, failed_storage = self._mesh.host.sum(torch.tensor(own, dtype=torch.int64)).tolist()
        self.reason = " and ".join(number.name for number, count in zip(STOP_SIGNALS, received, strict=True) if count)
        self.data_fault = "storage" if failed_storage else "data" if failed else None
        self._signals.are_heeded = bool(self.reason)
        return self.must_end
