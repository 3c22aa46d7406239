"""What a rank's main thread is doing, for the thread beside it that tells the other ranks."""

import sys
import threading
from types import FrameType


class Activity:
    """The step and the phase that the main thread is in; it says so itself, with `begin`."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.changes = 0
        """Phases begun so far; what stands still for long may be stalled."""
        self.lost_contact = False
        """Whether a collective has failed: then the main thread waits to be told why."""

    def begin(self, phase: str, step: int | None = None) -> None:
        """Begins a phase.

        Args:
            phase: for people, such as "reading data".
            step: counted from 1, if it is another one.
        """
        self.phase = phase
        if step is not None:
            self.step = step
        self.changes += 1  # last: who sees the change sees the phase too

    def waits_for_ranks(self) -> bool:
        """Whether this process is inside a collective or a message, as far as Python's stacks show, or was until now.

        A device that waits (NCCL's collectives run there) looks like one that works. Backward passes on a GPU run in
        threads of torch's that `threading` does not know; they are looked at too.
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
