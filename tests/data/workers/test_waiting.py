"""Tests that waits end at their limits, and that the error names the missing item."""

import threading

import pytest

from beit3_ds.data.workers.waiting import DataTimeoutError, ReaderThread, StopRequestedError, WaitLimits, WaitTimer


def test_a_wait_ends_at_its_limit_with_a_name() -> None:
    timer = WaitTimer(WaitLimits(seconds=0.0, where="rank 3 (host h)"))
    with pytest.raises(DataTimeoutError, match=r"rank 3 \(host h\) has waited 0 s for step 4\..*timeout_seconds=0"):
        timer.check(lambda: "step 4")
    timer.check(lambda: "step 4", is_start=True)  # catches a start of processes that is held to a short limit


def test_a_stop_request_comes_before_the_limit() -> None:
    with pytest.raises(StopRequestedError):
        WaitTimer(WaitLimits(seconds=0.0, is_stopping=lambda: True)).check(lambda: "step 4")


def test_a_thread_returns_raises_and_can_be_left_alone() -> None:
    thread, released = ReaderThread("a test"), threading.Event()
    limits = WaitLimits(seconds=60)
    assert thread.call(lambda: 5, limits, lambda: "five") == 5
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 // 0, limits, lambda: "an error")
    assert thread.call(lambda: 6, limits, lambda: "six") == 6  # catches a thread that an error ends
    with pytest.raises(DataTimeoutError, match="for a hang"):  # catches a read that blocks the main thread
        thread.call(released.wait, WaitLimits(seconds=0.3), lambda: "a hang")
    released.set()
    thread.close()
