"""Ends a process that still runs some seconds after a stop signal."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from beit3_ds.parallel.activity import Activity
from beit3_ds.runtime.main_thread import describe_main_thread
from beit3_ds.runtime.stop_signals import StopSignals, describe_signal, exit_status

STOP_SECONDS = 5.0
"""Seconds after a stop signal within which a process ends. During training, only a rank's waits for other ranks are
limited, not its own work. Such a wait may last this number of seconds or twice the longest phase of a step so far,
whichever is longer."""
_PEER_FACTOR = 2.0
"""Time limit of a wait for other ranks after a stop signal, as a multiple of the longest phase of a step so far."""
_SECOND_INTERRUPT_SECONDS = 1.0
_POLL_SECONDS = 0.25


class StopDeadline:
    """Ends this process, from a separate thread, if the process does not end within a time limit after a stop signal.

    Before the first step and after the last step, the limit is `STOP_SECONDS`. During training, a rank may finish its
    step and save a checkpoint, so no limit applies to the rank's own work. The limit then applies to each wait for
    other ranks. It is the longer of two times: `STOP_SECONDS`, and twice the time of the longest phase that this rank
    has had. A phase is a part of a step, such as a micro-batch's forward pass. A second SIGINT ends the process within
    about one second.
    """

    def __init__(self, rank: int, signals: StopSignals, end: Callable[[int], None] = os._exit) -> None:
        """Starts a thread that ends the process if the process still runs `STOP_SECONDS` after a stop signal.

        Between the calls of `limit_waits` and `limit_all`, there are only two cases in which the thread ends the
        process: a wait for other ranks takes too long, or a second SIGINT arrives.

        Args:
            rank: rank of this process, for messages.
            signals: recorder of the stop signals that this process receives.
            end: function that ends this process at once, even if the main thread is blocked in a call.
        """
        self._rank, self._signals, self._end = rank, signals, end
        self._activity: Activity | None = None
        self._phase, self._consequence = "the start", "Nothing was trained; the same command starts again."
        self._phase_since = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop deadline", daemon=True)
        self._thread.start()

    def limit_waits(self, activity: Activity) -> None:
        """Changes the deadline after a stop signal: from now on, only this rank's waits for other ranks have a time
        limit, not its own work.

        Call this method when training begins.

        Args:
            activity: current activity of this rank's main thread.
        """
        self._phase_since, self._activity = time.monotonic(), activity

    def limit_all(self, phase: str, consequence: str) -> None:
        """Sets a time limit for all work of this rank after a stop signal, not only for its waits for other ranks.

        The limit is `STOP_SECONDS`, counted from this call or from the stop signal, whichever is later. Call this
        method when this rank has no more state to save.

        Args:
            phase: name of the next part of the program, for messages, such as "the report".
            consequence: sentence for messages. It tells what is saved, and what happens if the same command runs again.
        """
        self._phase, self._consequence = phase, consequence
        self._phase_since, self._activity = time.monotonic(), None

    def stop(self) -> None:
        """Stops the thread."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        changes, changed_at = -1, 0.0
        while not self._over.wait(_POLL_SECONDS):
            now, activity, received_at = time.monotonic(), self._activity, self._signals.received_at
            if received_at is None:
                continue
            if activity is not None and (activity.changes != changes or not activity.waits_for_ranks()):
                changes, changed_at = activity.changes, now
            since = max(received_at, self._phase_since, changed_at)
            is_urgent = self._signals.num_interrupts > 1
            limit = STOP_SECONDS
            if is_urgent:
                since, limit = received_at, _SECOND_INTERRUPT_SECONDS
            elif activity is not None:
                limit = max(STOP_SECONDS, _PEER_FACTOR * activity.longest_seconds)
            if now - since >= limit:
                self._finish(now - since, activity)
                return

    def _finish(self, seconds: float, activity: Activity | None) -> None:
        number = min(self._signals.received)
        where = describe_main_thread("" if activity is None else "waiting for other ranks")
        if activity is None:
            what = f"{self._phase} has not ended {seconds:.0f} s later: {where}. {self._consequence}"
        else:
            what = (
                f"step {activity.step}, {activity.phase}, has waited for other ranks for {seconds:.0f} s: {where}. The "
                "steps since the newest checkpoint are lost; the same command resumes from it."
            )
        line = f"error on rank {self._rank}: {describe_signal(number)} was received, and {what}"
        print(line, file=sys.stderr, flush=True)
        self._end(exit_status(number))


@contextmanager
def stop_deadline(rank: int, signals: StopSignals) -> Iterator[StopDeadline]:
    """Runs a `StopDeadline` inside a `with` block, and stops it at the end of the `with` block."""
    deadline = StopDeadline(rank, signals)
    try:
        yield deadline
    finally:
        deadline.stop()
