"""Tests that failures are detected from heartbeats alone, on a simulated clock."""

from collections.abc import Collection

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.config import ParallelConfig
from beit3_ds.runtime import heartbeat
from beit3_ds.runtime.failure_detector import Failure, FailureDetector
from beit3_ds.runtime.heartbeat import Heartbeat, RankStatuses

PARALLEL = ParallelConfig(heartbeat_timeout_seconds=60, timeout_seconds=600)
BEAT_SECONDS = 10


class Clock:
    """Simulates ranks that send a heartbeat every ten seconds, and a detector that runs every second."""

    def __init__(self, patch: pytest.MonkeyPatch, num_ranks: int = 4) -> None:
        self.now = 0.0
        patch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        self.beats = [Heartbeat(1, 0, 1, "starting", False) for _ in range(num_ranks)]
        self.statuses = RankStatuses(self.beats, 1.0)
        self.detector = FailureDetector(PARALLEL, self.statuses, lambda rank: f"rank {rank}")
        self.slow: list[str] = []

    def run(
        self, seconds: int, *, dead: Collection[int] = (), busy: Collection[int] = (), requested: bool = False
    ) -> Failure | None:
        """Advances the clock until a failure is found; ranks that are neither dead nor busy wait for others."""
        for _ in range(seconds):
            self.now += 1
            for rank, beat in enumerate(self.beats):
                if rank not in dead and (self.now % BEAT_SECONDS == 0 or requested):
                    self.beats[rank] = beat._replace(number=beat.number + 1, is_waiting=rank not in busy)
            self.statuses.update(self.beats)
            failure = self.detector.find_failure(None, requested)
            self.slow += self.detector.describe_slow()
            if failure is not None:
                return failure
        return None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_dead_rank_is_lost_after_the_heartbeat_timeout(clock: Clock) -> None:
    """Checks that a dead rank is not reported as slow first.

    The last heartbeat of the rank was busy, and the other ranks wait.
    """
    assert clock.run(30, busy={2}) is None
    assert clock.run(100, dead={2}) == Failure("rank 2 does not answer")
    assert 90 <= clock.now <= 102 and not clock.slow


def test_busy_rank_is_slow_and_then_stalled(clock: Clock) -> None:
    """Expects reports after one, two, four and eight heartbeat time-outs, and the end after timeout_seconds."""
    failure = clock.run(1000, busy={1})
    assert failure is not None and failure.dump_stacks
    assert failure.text.startswith("stalled: rank 1 is in step 1, starting, for 6") and "3 ranks wait" in failure.text
    assert 600 < clock.now < 640
    assert len(clock.slow) == 4 and all(line.startswith("slow: rank 1 is in step 1, starting") for line in clock.slow)


def test_nobody_is_slow_if_nobody_waits(clock: Clock) -> None:
    """Checks a step that takes longer than every time-out on all ranks alike."""
    assert clock.run(2000, busy={0, 1, 2, 3}) is None and not clock.slow


def test_called_ranks_have_five_seconds(clock: Clock) -> None:
    assert clock.run(30) is None
    assert clock.run(20, dead={3}, requested=True) == Failure("rank 3 does not answer")
    assert 35 <= clock.now <= 37


def test_deadlock_names_the_least_advanced(clock: Clock) -> None:
    """Checks that the least advanced rank is named when all ranks wait in different collectives."""
    clock.run(15)
    clock.beats = [beat._replace(changes=9 - (rank == 1)) for rank, beat in enumerate(clock.beats)]
    failure = clock.run(20, requested=True)
    assert (
        failure is not None
        and failure.dump_stacks
        and "though all still answer. Least advanced: rank 1." in failure.text
    )


def test_a_failure_comes_before_all_else(clock: Clock) -> None:
    assert clock.detector.find_failure("rank 2 failed: OSError", True) == Failure("rank 2 failed: OSError")


def test_a_rank_that_left_is_not_missed(clock: Clock) -> None:
    clock.beats[3] = clock.beats[3]._replace(state="left")
    assert clock.run(500, dead={3}) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10_000), st.integers(0, 3))
def test_a_detector_that_slept_blames_nobody(sleep: int, dead: int) -> None:
    """Checks that a detector that was suspended reports no rank too early.

    Ranks that send heartbeats again are not reported. A dead rank is reported only after a full time-out.
    """
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        assert clock.run(30) is None
        clock.now += sleep
        assert clock.run(50, dead={dead}) is None and not clock.slow
        assert clock.run(30, dead={dead}) == Failure(f"rank {dead} does not answer")
