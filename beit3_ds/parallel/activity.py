"""Records what a rank's main thread is doing, for the watchdog's thread, which reports it to the other ranks."""

import sys
import threading
from types import FrameType


class Activity:
    """The current step and phase of the main thread, which sets them with `begin`."""

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.changes = 0
        """Number of phases begun so far; a rank without a new one for long may be stalled."""
        self.lost_contact = False
        """Whether a collective has failed, so that the main thread waits for the reason."""

    def begin(self, phase: str, step: int | None = None) -> None:
        """Begins a phase.

        Args:
            phase: description for people, such as "reading data".
            step: step from 1; None if it is the same as before.
        """
        self.phase = phase
        if step is not None:
            self.step = step
        self.changes += 1  # last, so that a reader of the new number also reads the new phase

    def waits_for_ranks(self) -> bool:
        """Returns whether this process waits in a collective or a message, by Python's stacks, or lost contact in one.

        A device that waits looks like one that computes, because NCCL's collectives run on it. The threads of torch
        that run backward passes on a GPU are included, although `threading` does not list them.
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
