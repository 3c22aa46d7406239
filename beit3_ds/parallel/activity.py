"""Records the step and phase of a rank's main thread. The watchdog reports them to other ranks."""

import sys
import threading
import time
from types import FrameType

_UNMEASURED = ("starting", "reading data", "saving")
"""Phases that may take much longer than a step. Their durations are not included in `Activity.longest_seconds`."""


class Activity:
    """Holds the current step and phase of the main thread, which calls `begin` whenever they change."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.changes = 0
        """Number of calls of `begin` so far. A rank may be stalled if this number stops increasing."""
        self.longest_seconds = 0.0
        """Duration of the longest phase of a step or an evaluation so far, in seconds."""
        self._begun_at = time.monotonic()
        self.lost_contact = False
        """True after a collective has failed, while the main thread waits until rank 0 has found the cause of the
        failure."""

    def begin(self, phase: str, step: int | None = None) -> None:
        """Begins a phase.

        Args:
            phase: description of the phase for messages, such as "reading data".
            step: number of the step, from 1; None keeps the current number.
        """
        now = time.monotonic()
        if self.phase not in _UNMEASURED:
            self.longest_seconds = max(self.longest_seconds, now - self._begun_at)
        self.phase, self._begun_at = phase, now
        if step is not None:
            self.step = step
        self.changes += 1  # changed last, so that a thread that sees the new number also sees the new phase

    def waits_for_ranks(self) -> bool:
        """Returns whether this rank waits for other ranks.

        The rank waits while a thread is in a collective. After a collective has failed, this property is also True.

        Inspects the Python stacks of the main thread and of threads that `threading` does not list, such as torch's
        backward threads. GPU load cannot show a wait, because NCCL's kernels keep a waiting GPU busy.
        """
        if self.lost_contact:
            return True
        ours = {thread.ident for thread in threading.enumerate() if not isinstance(thread, threading._DummyThread)}
        ours.discard(threading.main_thread().ident)
        return any(_waits(frame) for thread, frame in sys._current_frames().items() if thread not in ours)


def _waits(frame: FrameType) -> bool:
    path, function = frame.f_code.co_filename, frame.f_code.co_name
    if "/torch/distributed/" in path:
        return True
    return function == "wait" and ("/deepspeed/" in path or "/beit3_ds/parallel/" in path)
