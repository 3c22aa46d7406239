"""Ends a command after a stop signal. The command may first delete unfinished files, within a time limit."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from beit3_ds.runtime.stop_signals import STOP_SIGNALS, describe_signal, exit_status, handled_signals, reading_signals

STOP_SECONDS = 5.0
"""Time limit in seconds for cleanup after a stop signal. A command that exceeds this limit is ended at once."""


class StoppedBySignal(KeyboardInterrupt):
    """Reports the stop signal that ends a command. Libraries treat this exception like Ctrl-C.

    Attributes:
        number: number of the signal.
        status: exit status of the command (`exit_status`).
    """

    def __init__(self, number: int) -> None:
        """Stores the number of the stop signal."""
        super().__init__(
            f"stopped by {describe_signal(number)}: each file is complete or absent; the same command starts again"
        )
        self.number, self.status = number, exit_status(number)


@contextmanager
def ending_on_signals(end: Callable[[int], None] = os._exit) -> Iterator[None]:
    """Raises `StoppedBySignal` in the block when the first stop signal arrives; does nothing outside the main thread.

    Python raises the exception after the current library call returns. If the block still runs `STOP_SECONDS` after the
    signal, the process is ended. Later signals have no effect.

    Args:
        end: function that ends this process at once with an exit status, even if the main thread is blocked in a call.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    timer = threading.Timer(STOP_SECONDS, lambda: _end_now(received[0], end))
    timer.daemon = True
    raised: int | None = None

    def note(number: int) -> None:  # in the thread that reads signals
        if number in STOP_SIGNALS and not received:
            received.append(number)
            timer.start()

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if raised is None:
            raised = number
            raise StoppedBySignal(number)

    with reading_signals(note):
        before = {number: signal.signal(number, handle) for number in handled_signals()}
        try:
            yield
        except Exception as error:
            if raised is not None:
                raise StoppedBySignal(raised) from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            timer.cancel()


def _end_now(number: int, end: Callable[[int], None]) -> None:
    print(f"error: {StoppedBySignal(number)}", file=sys.stderr, flush=True)
    end(exit_status(number))


def end_program(status: int) -> NoReturn:
    """Exits this program with a status. A SIGINT during the exit ends the process at once, without a traceback.

    The exit may take about a second because of threads and libraries. Call this function when all results are complete.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)
