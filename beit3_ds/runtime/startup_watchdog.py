"""Ends a process that hangs while it opens its files, and prints the hanging call. Only this watchdog limits the time
of opening files.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from beit3_ds.runtime.main_thread import describe_main_thread

NOTICE_SECONDS = 60.0
"""Seconds between two messages about a start that makes no progress."""
_POLL_SECONDS = 0.5
_IDLE_SHARE = 0.01
"""Fraction of one core's time. The start makes no progress if two conditions hold: the main thread uses no CPU time,
and the whole process uses at most this fraction."""


class StartupWatchdog:
    """Ends the process, from a separate thread, if the main thread makes no progress while it opens files.

    Without this thread, a file system that hangs would block the process forever.
    """

    def __init__(self, rank: int, seconds: float, end: Callable[[int], None] = os._exit) -> None:
        """Starts the thread that watches the main thread.

        Args:
            rank: rank of this process, for messages.
            seconds: maximum seconds without progress (`data.timeout_seconds`).
            end: ends this process at once, even if the main thread is blocked in a call.
        """
        self._rank, self._seconds, self._end = rank, seconds, end
        self._over = threading.Event()
        main = threading.main_thread()
        assert main.ident is not None
        self._clock = time.pthread_getcpuclockid(main.ident)
        self._thread = threading.Thread(target=self._watch, name="start watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stops the thread that watches the main thread. Call this method after the main thread has opened the files of
        the run.
        """
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        still_since, noticed = time.monotonic(), 0.0
        used = self._cpu_seconds()
        while not self._over.wait(_POLL_SECONDS):
            now, now_used = time.monotonic(), self._cpu_seconds()
            still = now - still_since
            if now_used[0] != used[0] or now_used[1] - used[1] > max(0.1, _IDLE_SHARE * still):
                still_since, noticed, used, still = now, 0.0, now_used, 0.0
            if still >= self._seconds:
                print(
                    f"error on rank {self._rank}: the start has stood still for {still:.0f} s (data.timeout_seconds): "
                    f"{self._where()}. Nothing was trained; the same command starts again.",
                    file=sys.stderr,
                    flush=True,
                )
                self._end(1)
                return
            if still - noticed >= NOTICE_SECONDS:
                noticed = still
                line = f"the start of rank {self._rank} has stood still for {still:.0f} s: {self._where()}"
                print(line, file=sys.stderr, flush=True)

    def _cpu_seconds(self) -> tuple[float, float]:
        """Returns the CPU time of the main thread and of the whole process in seconds."""
        return time.clock_gettime(self._clock), time.process_time()

    def _where(self) -> str:
        return describe_main_thread("opening its files")


@contextmanager
def watched_start(rank: int, seconds: float) -> Iterator[None]:
    """Runs a `StartupWatchdog` during the block; the arguments are those of `StartupWatchdog.__init__`."""
    watch = StartupWatchdog(rank, seconds)
    try:
        yield
    finally:
        watch.stop()
