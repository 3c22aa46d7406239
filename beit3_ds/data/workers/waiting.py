"""Waits for data with a time limit; each wait names what it waits for and reacts to a request to stop."""

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
"""Interval at which a wait checks whether it must end."""
_NOTICE_SECONDS = 30.0
_START_SECONDS = 120.0


class DataTimeoutError(ConfigError):
    """Data did not come in time; the message names the item that was waited for."""


class StopRequestedError(Exception):
    """A wait was given up because the run was asked to stop."""


def _never() -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class WaitLimits:
    """Conditions under which a wait for data must end."""

    seconds: float
    """`data.timeout_seconds`."""
    is_stopping: Callable[[], bool] = _never
    """Whether this process was asked to stop."""
    where: str = "this process"
    """Name of the waiting process, such as "rank 0 (host a)"."""


class WaitTimer:
    """One wait, from its beginning."""

    def __init__(self, limits: WaitLimits) -> None:
        """Begins now."""
        self._limits = limits
        self._start = time.monotonic()
        self._notice = _NOTICE_SECONDS

    @property
    def waited(self) -> float:
        """Seconds waited so far."""
        return time.monotonic() - self._start

    def restart(self) -> None:
        """Restarts the wait, because the item that it waits for has made progress."""
        self._start, self._notice = time.monotonic(), _NOTICE_SECONDS

    def check(self, what: Callable[[], str], *, is_start: bool = False) -> None:
        """Returns if the wait may continue; prints every 30 seconds on stderr what it waits for.

        Args:
            what: names the item that is waited for.
            is_start: whether a process must start first; its imports take long, so the limit is at least two minutes.

        Raises:
            StopRequestedError: if this process was asked to stop.
            DataTimeoutError: after `WaitLimits.seconds`.
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
    """A thread for calls that may block for ever, so that the main thread can give up waiting for them."""

    def __init__(self, name: str) -> None:
        """Takes the thread's name; the thread starts at the first call."""
        self._name = name
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def call(
        self, function: Callable[[], T], limits: WaitLimits, what: Callable[[], str], *, is_start: bool = False
    ) -> T:
        """Returns what `function` returns, or raises what it raises.

        Args:
            function: runs in the thread, and keeps running there if the wait is given up.
            limits: limits of the wait.
            what: names the item that is waited for.
            is_start: as for `WaitTimer.check`.

        Raises:
            StopRequestedError: if this process was asked to stop.
            DataTimeoutError: after `limits.seconds`.
        """
        if self._thread is None:
            # A daemon thread does not delay the end of the process.
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
        patience = WaitTimer(limits)
        while not done.wait(POLL_SECONDS):
            patience.check(what, is_start=is_start)
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Ends the thread once it is idle."""
        self._work.put(None)
        self._thread = None

    def _serve(self) -> None:
        while (work := self._work.get()) is not None:
            work()
