"""Watches the start of a run, where no other time limit applies; names a call that hangs, and ends the process."""

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

NOTICE_SECONDS = 60.0
"""Seconds between two messages that say where a start without progress hangs."""
STOP_SECONDS = 30.0
"""Seconds from a stop signal until an unfinished start ends the process. Most starts reach the first step earlier, and
there all ranks agree to stop. Clusters kill a job half a minute after the signal or later. No training is lost, because
no step was done since the newest checkpoint."""
_POLL_SECONDS = 0.5
_IDLE_SHARE = 0.01
"""A process that uses less than this share of one core counts as waiting."""
_PACKAGE = str(Path(__file__).parents[1])


class StartupWatchdog:
    """Runs a thread that watches the main thread from the start of the process until the first step.

    If the file system hangs while files are opened, the main thread blocks for ever. Stop signals then have no effect,
    because they are only recorded until the ranks can agree to stop.
    """

    def __init__(
        self, rank: int, received: Iterable[int], seconds: float, end: Callable[[int], None] = os._exit
    ) -> None:
        """Starts the thread that watches.

        Args:
            rank: rank of this process, for messages.
            received: stop signals that this process has received; the thread reads them repeatedly.
            seconds: longest time without progress while files are opened (`data.timeout_seconds`).
            end: ends this process, even if its main thread is blocked in a call.
        """
        self._rank, self._received, self._seconds, self._end = rank, received, seconds, end
        self._opens_files = True
        self._over = threading.Event()
        main = threading.main_thread()
        assert main.ident is not None
        self._ident, self._clock = main.ident, time.pthread_getcpuclockid(main.ident)
        self._thread = threading.Thread(target=self._watch, name="start watch", daemon=True)
        self._thread.start()

    def end_opening(self) -> None:
        """Disables the time limit for opening files; call it before this rank waits for other ranks.

        Waits for other ranks have separate time limits. The thread still reacts to stop signals.
        """
        self._opens_files = False

    def stop(self) -> None:
        """Stops the thread; call this when the training steps begin."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        still_since, noticed, signalled_at = time.monotonic(), 0.0, None
        used = self._cpu_seconds()
        while not self._over.wait(_POLL_SECONDS):
            now, now_used = time.monotonic(), self._cpu_seconds()
            still = now - still_since
            if now_used[0] != used[0] or now_used[1] - used[1] > max(0.1, _IDLE_SHARE * still):
                still_since, noticed, used, still = now, 0.0, now_used, 0.0
            if received := sorted(self._received):
                signalled_at = signalled_at or now
                if now - signalled_at >= STOP_SECONDS:
                    name = signal.Signals(received[0]).name
                    self._finish(
                        f"{name} came during the start, which has not ended {STOP_SECONDS:.0f} s later",
                        128 + received[0],
                    )
                    return
            if self._opens_files and still >= self._seconds:
                self._finish(f"the start has stood still for {still:.0f} s (data.timeout_seconds)", 1)
                return
            if self._opens_files and still - noticed >= NOTICE_SECONDS:
                noticed = still
                line = f"the start of rank {self._rank} has stood still for {still:.0f} s: {self._where()}"
                print(line, file=sys.stderr, flush=True)

    def _cpu_seconds(self) -> tuple[float, float]:
        """Returns the processor time of the main thread and of the whole process, in seconds."""
        return time.clock_gettime(self._clock), time.process_time()

    def _where(self) -> str:
        """Returns the line of code at which the main thread is, and the file or folder that it uses."""
        frame = sys._current_frames().get(self._ident)
        lines, paths = [], []
        for inner, line in traceback.walk_stack(frame):
            if inner.f_code.co_filename.startswith(_PACKAGE) and inner.f_code.co_filename != __file__:
                lines.append(f"{Path(inner.f_code.co_filename).name}:{line} ({inner.f_code.co_name})")
                values = [inner.f_locals.get(name) for name in ("path", "file", "name", "self")]
                values += [getattr(values[-1], name, None) for name in ("path", "_path")]
                paths += [os.fspath(value) for value in values if isinstance(value, str | Path)]
        named = f"with {paths[0]}" if paths else "opening its files" if self._opens_files else "waiting for other ranks"
        return f"{named}, at {lines[0]}" if lines else named

    def _finish(self, why: str, status: int) -> None:
        line = (
            f"error on rank {self._rank}: {why}: {self._where()}. Nothing was trained; the same command starts again."
        )
        print(line, file=sys.stderr, flush=True)
        self._end(status)


@contextmanager
def watched_start(rank: int, received: Iterable[int], seconds: float) -> Iterator[StartupWatchdog]:
    """Runs a `StartupWatchdog`, with the arguments of its constructor, until the block ends or `stop` is called."""
    watch = StartupWatchdog(rank, received, seconds)
    try:
        yield watch
    finally:
        watch.stop()
