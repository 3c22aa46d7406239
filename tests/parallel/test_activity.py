"""Tests the reported activity of a rank's main thread, and whether it counts as waiting for other ranks."""

import threading
import time
from collections.abc import Callable
from typing import Any

from beit3_ds.parallel.activity import Activity

# Runs a call in a file whose name in stacks looks like one of torch.
IN_TORCH = compile("def call(wait): wait()", "/site-packages/torch/distributed/distributed_c10d.py", "exec")


def in_torch(call: Callable[[], Any]) -> None:
    names: dict[str, Any] = {}
    exec(IN_TORCH, names)
    names["call"](call)


def test_a_phase_keeps_its_step_until_another_begins() -> None:
    activity = Activity()
    assert (activity.step, activity.phase, activity.changes) == (0, "starting", 0)
    activity.begin("reading data", 12)
    activity.begin("forward")
    assert (activity.step, activity.phase, activity.changes) == (12, "forward", 2)


def test_a_main_thread_in_a_collective_waits() -> None:
    activity, lock, seen = Activity(), threading.Lock(), []
    lock.acquire()

    def watch() -> None:
        deadline = time.monotonic() + 60
        while not (waits := activity.waits_for_ranks()) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append(waits)
        lock.release()  # ends the collective

    thread = threading.Thread(target=watch)
    thread.start()
    in_torch(lock.acquire)
    thread.join()
    assert seen == [True] and not activity.waits_for_ranks()


def test_a_thread_of_ours_in_a_collective_does_not_count() -> None:
    """Catches a background thread, such as one that gathers for a checkpoint, that counts as waiting."""
    activity, lock = Activity(), threading.Lock()
    lock.acquire()
    thread = threading.Thread(target=in_torch, args=(lock.acquire,))
    thread.start()
    time.sleep(0.2)  # until it waits; if this is too short, the test passes
    waits = activity.waits_for_ranks()
    lock.release()
    thread.join()
    assert not waits


def test_a_rank_that_lost_contact_waits_for_the_reason() -> None:
    activity = Activity()
    activity.lost_contact = True
    assert activity.waits_for_ranks()
