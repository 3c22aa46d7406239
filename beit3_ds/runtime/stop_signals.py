"""Records the stop signals SIGTERM, SIGINT, SIGUSR1 and SIGHUP, after which a run saves a checkpoint and ends."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
"""Signals that stop a run. Cluster managers send SIGTERM or SIGUSR1 before SIGKILL. Ctrl-C sends SIGINT. A closing
terminal sends SIGHUP."""

_END = 0  # no signal has this number


def handled_signals() -> tuple[signal.Signals, ...]:
    """Returns `STOP_SIGNALS`, but without SIGHUP if this process ignores SIGHUP, as under `nohup`."""
    return tuple(
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    )


def exit_status(number: int) -> int:
    """Returns the exit status of a process that a stop signal ended before it could save: 128 plus the signal's number.

    SIGHUP counts as SIGTERM, as in `beit3 launch`.
    """
    return 128 + (signal.SIGTERM if number == signal.SIGHUP else number)


def describe_signal(number: int) -> str:
    """Returns the name of a stop signal, for messages."""
    return "SIGHUP (the terminal is closed)" if number == signal.SIGHUP else signal.Signals(number).name


class StopSignals:
    """Records the stop signals that this process or another rank of the run has received.

    A thread reads this process's signals from a pipe. Python's signal handlers alone would be too late: they wait while
    the main thread is in a library call, such as a collective of gloo.
    """

    def __init__(self) -> None:
        self.received: set[int] = set()
        """Stop signals that this process or another rank has received so far, as signal numbers such as 15 for SIGTERM.
        """
        self.received_at: float | None = None
        """Monotonic time of the first stop signal in seconds; None before any stop signal."""
        self.num_interrupts = 0
        """Number of SIGINT signals received so far."""
        self.is_stop_agreed = False
        """Whether all ranks have agreed to stop because of a stop signal (`DistributedStopSignals.synchronize`)."""
        self._has_handled_interrupt = False

    def is_any_received(self) -> bool:
        """Returns whether this process or another rank of the run has received a stop signal."""
        return bool(self.received)

    @contextmanager
    def handling(self) -> Iterator["StopSignals"]:
        """Records stop signals inside a `with` block, instead of ending the process.

        Entering the block also removes the stop signals from the thread's mask of blocked signals. A second SIGINT
        raises KeyboardInterrupt. If all ranks have agreed to stop, stop signals are ignored after the block. A late
        signal then does not kill the process, which the launcher would report as a failure. Only the main thread may
        enter the block.
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
        """Records a stop signal that this process or another rank has received. Any thread may call this method."""
        self.received_at = self.received_at or time.monotonic()
        self.received.add(number)

    def _note(self, number: int) -> None:
        """Records a signal. The thread that reads the pipe calls this method."""
        if number in STOP_SIGNALS:
            self.num_interrupts += number == signal.SIGINT
            self.record(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Records a signal, and raises KeyboardInterrupt at the second SIGINT. This method is a Python signal handler.

        Python calls the handler on the main thread. A separate thread also records each signal (`_note`), before or
        after this call.
        """
        is_second = number == signal.SIGINT and self._has_handled_interrupt
        self._has_handled_interrupt |= number == signal.SIGINT
        self.record(number)
        if is_second:
            raise KeyboardInterrupt


@contextmanager
def reading_signals(note: Callable[[int], None]) -> Iterator[None]:
    """Calls `note` in another thread with the number of each signal that arrives inside a `with` block.

    Signals without a Python handler are not reported. Only the main thread may enter the block.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    before = signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read, args=(readable, note), name="stop signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        # A library may have replaced the pipe: asyncio does this until its loop is closed.
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
