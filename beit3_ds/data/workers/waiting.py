"""Waits for data until a time limit or a stop signal. During a long wait, messages name the awaited data."""

import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from beit3_ds.config import ConfigError

T = TypeVar("T")

POLL_SECONDS = 0.2
"""Seconds between two checks of the time limit and the stop signal during a wait."""
_NOTICE_SECONDS = 30.0
_START_SECONDS = 120.0


class DataTimeoutError(ConfigError):
    """Reports that an item was not ready within the time limit; the message names the item."""


class StopRequestedError(Exception):
    """Signals that a wait ended because of a stop signal."""


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """Holds the limits of a wait for data: a maximum time and a stop signal."""

    seconds: float
    """Maximum wait in seconds (`data.timeout_seconds`)."""
    is_stopping: Callable[[], bool] = _never
    """Function that returns whether this process was asked to stop."""
    where: str = "this process"
    """Name of the waiting process for messages, such as "rank 0 (host a)"."""


class WaitTimer:
    """Measures the duration of one wait; raises an exception when a limit is reached."""

    def __init__(self, limits: WaitLimits) -> None:
        """Starts the timer of a wait."""
        self._limits = limits
        self._start = time.monotonic()
        self._notice = _NOTICE_SECONDS

    @property
    def waited(self) -> float:
        """Returns the seconds since the start of the wait."""
        return time.monotonic() - self._start

    def restart(self) -> None:
        """Restarts the measurement after the awaited item has made progress."""
        self._start, self._notice = time.monotonic(), _NOTICE_SECONDS

    def check(self, what: Callable[[], str], *, is_start: bool = False) -> None:
        """Raises an exception if the wait must end; otherwise reports the awaited item on stderr every 30 seconds.

        Args:
            what: function that returns the name of the awaited item.
            is_start: whether the wait includes the start of a process. If true, the time limit is at least two minutes,
                because imports take long.

        Raises:
            StopRequestedError: if this process was asked to stop.
            DataTimeoutError: if the time limit is reached: `WaitLimits.seconds`, or the larger limit with `is_start`.
        """
        limits, waited = self._limits, self.waited
        if limits.is_stopping():
            raise StopRequestedError
        if waited >= (max(limits.seconds, _START_SECONDS) if is_start else limits.seconds):
            raise DataTimeoutError(
                f"{limits.where} has waited {waited:.0f} s for {what()}. Look at that process and at the file system "
                f"that it reads, or raise data.timeout_seconds={limits.seconds:g}."
            )
        if waited >= self._notice:
            self._notice += _NOTICE_SECONDS
            print(f"{limits.where} has waited {waited:.0f} s for {what()}", file=sys.stderr, flush=True)


class ReaderThread:
    """Runs calls in a separate thread. If a call blocks forever, the main thread can stop waiting for it."""

    def __init__(self, name: str) -> None:
        """Stores the name of the thread; the first call of `call` starts the thread."""
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(
        self, function: Callable[[], T], limits: WaitLimits, what: Callable[[], str], *, is_start: bool = False
    ) -> T:
        """Calls `function` in the thread; returns the result or raises the exception of the call.

        Args:
            function: function without arguments. If the wait ends with an error listed below, the function continues to
                run in the thread.
            limits: limits of the wait.
            what: function that returns the name of the awaited item.
            is_start: whether the wait includes the start of a process. If true, the time limit is at least two minutes.

        Raises:
            StopRequestedError: if this process was asked to stop.
            DataTimeoutError: if the time limit is reached: `limits.seconds`, or the larger limit with `is_start`.
        """
        if self._thread is None:
            # A daemon thread does not keep the process alive.
            self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
            self._thread.start()
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                results.append(function())
            except BaseException as error:
                errors.append(error)
            done.set()

        self._work.put(work)
        timer = WaitTimer(limits)
        while not done.wait(POLL_SECONDS):
            timer.check(what, is_start=is_start)
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Asks the thread to end after its current call."""
        self._work.put(None)
        self._thread = None

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
