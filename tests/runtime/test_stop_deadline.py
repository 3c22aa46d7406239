"""Tests the deadline after a stop signal.

A rank that only waits for others ends. A rank that computes or saves finishes first.
"""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from beit3_ds.parallel.activity import Activity
from beit3_ds.runtime import stop_deadline
from beit3_ds.runtime.stop_deadline import StopDeadline
from beit3_ds.runtime.stop_signals import StopSignals


class FakeActivity(Activity):
    is_waiting = True

    def waits_for_ranks(self) -> bool:
        return self.is_waiting


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Iterator[StopSignals]:
    monkeypatch.setattr(stop_deadline, "STOP_SECONDS", 0.4)
    monkeypatch.setattr(stop_deadline, "_POLL_SECONDS", 0.02)
    with StopSignals().handling() as signals:
        yield signals


def ends_within(seconds: float, statuses: list[int]) -> bool:
    deadline = time.monotonic() + seconds
    while not statuses and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(statuses)


def test_a_wait_for_other_ranks_ends(signals: StopSignals, capfd: pytest.CaptureFixture[str]) -> None:
    activity, statuses = FakeActivity(), []
    deadline = StopDeadline(1, signals, statuses.append)
    deadline.limit_waits(activity)
    activity.begin("backward of micro-batch 0", 7)
    assert not ends_within(0.6, statuses), "no signal has come"
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ends_within(5, statuses) and statuses == [128 + signal.SIGUSR1]
    error = capfd.readouterr().err
    assert "error on rank 1: SIGUSR1 was received, and step 7, backward of micro-batch 0, has waited for" in error
    deadline.stop()


@pytest.mark.parametrize("reason", ["computes", "makes progress", "has long steps"])
def test_a_rank_that_works_is_let_alone(signals: StopSignals, reason: str) -> None:
    """Catches a time limit on a step or a save, which a stop must not lose."""
    activity, statuses = FakeActivity(), []
    activity.is_waiting = reason != "computes"
    if reason == "has long steps":
        activity.begin("update", 1)
        time.sleep(1)
        activity.begin("reading data", 2)
    deadline = StopDeadline(0, signals, statuses.append)
    deadline.limit_waits(activity)
    os.kill(os.getpid(), signal.SIGTERM)
    for phase in range(6):
        if reason == "makes progress":
            activity.begin(f"forward of micro-batch {phase}")
        assert not ends_within(0.2, statuses)
    deadline.stop()


def test_nothing_is_waited_for_when_all_is_saved(signals: StopSignals, capfd: pytest.CaptureFixture[str]) -> None:
    activity, statuses = FakeActivity(), []
    activity.is_waiting = False
    deadline = StopDeadline(0, signals, statuses.append)
    deadline.limit_waits(activity)
    os.kill(os.getpid(), signal.SIGTERM)
    assert not ends_within(0.6, statuses)
    deadline.limit_all("the report", "All steps are saved.")
    assert ends_within(5, statuses) and statuses == [128 + signal.SIGTERM]
    assert "SIGTERM was received, and the report has not ended" in capfd.readouterr().err
    deadline.stop()


def test_a_second_interrupt_ends_a_rank_that_waits(signals: StopSignals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second Ctrl-C without effect in a collective, where Python runs no signal handler."""
    monkeypatch.setattr(stop_deadline, "_SECOND_INTERRUPT_SECONDS", 0.1)
    activity, statuses = FakeActivity(), []
    activity.is_waiting = False
    deadline = StopDeadline(0, signals, statuses.append)
    deadline.limit_waits(activity)
    os.kill(os.getpid(), signal.SIGINT)
    assert not ends_within(0.6, statuses)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert ends_within(5, statuses) and statuses == [128 + signal.SIGINT]
    deadline.stop()
