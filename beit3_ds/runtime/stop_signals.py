"""Records stop signals: SIGTERM, SIGINT and SIGUSR1 end a run after its current step, with a checkpoint."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""Signals that stop a run. Cluster managers send SIGTERM or SIGUSR1 before SIGKILL; Ctrl-C sends SIGINT."""


class StopSignals:
    """Records the stop signals that this process has received."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        """Numbers of the stop signals received so far."""
        self.is_stop_agreed = False
        """Whether all ranks have agreed to stop because of a stop signal (`DistributedStopSignals.synchronize`)."""

    def is_any_received(self) -> bool:
        """Returns whether this process has received a stop signal."""
        return bool(self.received)

    @contextmanager
    def handling(self) -> Iterator["StopSignals"]:
        """Records stop signals during the block instead of letting them end the process; for the main thread only.

        Also unblocks the signals, because `beit3 launch` starts ranks with the signals blocked. A second SIGINT raises
        KeyboardInterrupt, as Python does by default. If the ranks have agreed to stop, the signals are ignored after
        the block: a late signal must not kill a rank whose work is done, because the launcher would report a failure.
        """
        before = {number: signal.signal(number, self._record) for number in STOP_SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.is_stop_agreed else handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and number in self.received:
            raise KeyboardInterrupt
        self.received.add(number)
