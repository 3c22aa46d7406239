"""Records stop signals: SIGTERM, SIGINT, SIGUSR1 and SIGHUP end a run after its current step, with a checkpoint."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that stop a run. Cluster managers send SIGTERM or SIGUSR1 before SIGKILL, Ctrl-C sends SIGINT, and a closing
terminal sends SIGHUP."""

_END = 0  # no signal has this number


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns `STOP_SIGNALS`, without SIGHUP if this process ignores it, as under `nohup`."""
    return tuple(
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    )


def exit_status(number: int) -> int:
    """Returns the exit status of a process that a stop signal ended before it could save: 128 + the signal's number.

    SIGHUP counts as SIGTERM, as in `beit3 launch`.
    """
    return 128 + (signal.SIGTERM if number == signal.SIGHUP else number)


def describe_signal(number: int) -> str:
    """Returns the name of a stop signal, for messages."""
    return "SIGHUP (the terminal is closed)" if number == signal.SIGHUP else signal.Signals(number).name


class StopSignals:
    """Records the stop signals that this process has received.

    A thread reads the signals from a pipe, because Python's handlers wait while the main thread is in a call such as
    gloo's.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        """Numbers of the stop signals that this process, or another rank of the run, has received so far."""
        self.received_at: float | None = None
        """Time of the first stop signal, on the monotonic clock; None if none was received."""
        self.num_interrupts = 0
        """Number of SIGINTs received so far."""
        self.is_stop_agreed = False
        """Whether all ranks have agreed to stop because of a stop signal (`DistributedStopSignals.synchronize`)."""
        self._has_handled_interrupt = False

    def is_any_received(self) -> bool:
        """Returns whether this process, or another rank of the run, has received a stop signal."""
        return bool(self.received)

    @contextmanager
    def handling(self) -> Iterator["StopSignals"]:
        """Records stop signals during the block, so that they do not end the process; only the main thread may enter.

        The block also unblocks the signals. A second SIGINT raises KeyboardInterrupt. If the ranks have agreed to stop,
        the signals are ignored after the block, because a late signal would look like a failure to the launcher.
        """
        numbers = handled_signals()
        with reading_signals(self._note):
            before = {number: signal.signal(number, self._handle) for number in numbers}
            signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
            try:
                yield self
            finally:
                for number, handler in before.items():
                    signal.signal(number, signal.SIG_IGN if self.is_stop_agreed else handler)

    def record(self, number: int) -> None:
        """Records a stop signal, which this process or another rank has received; any thread may call it."""
        self.received_at = self.received_at or time.monotonic()
        self.received.add(number)

    def _note(self, number: int) -> None:
        """Records a signal; runs in the thread that reads the pipe."""
        if number in STOP_SIGNALS:
            self.num_interrupts += number == signal.SIGINT
            self.record(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Records a signal; runs in the main thread, before or after `_note` runs for the same signal."""
        is_second = number == signal.SIGINT and self._has_handled_interrupt
        self._has_handled_interrupt |= number == signal.SIGINT
        self.record(number)
        if is_second:
            raise KeyboardInterrupt


@contextmanager
def reading_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note`, from another thread, with the number of each signal that arrives; only the main thread may enter.

    Only signals that have a handler in Python are read, because the interpreter writes no others into the pipe.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read, args=(readable, note), name="stop signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # A library may have replaced the pipe, as asyncio does until its loop is closed.
        with contextlib.suppress(ValueError, OSError):
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.write(writable, bytes([_END]))  # closing would not end the thread if a forked process has the pipe
        thread.join()
        os.close(writable)
        os.close(readable)


def _read(pipe: int, note: Callable[[int], None]) -> None:
    while True:
        for number in os.read(pipe, 256):
            if number == _END:
                return
            note(number)
