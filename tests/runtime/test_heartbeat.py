"""Tests that the status of ranks follows from heartbeats alone, on the clock of the receiving process."""

import pytest

from beit3_ds.runtime import heartbeat
from beit3_ds.runtime.heartbeat import Heartbeat, RankStatuses, find_sleep
from beit3_ds.runtime.keyed_store import ForgedValueError


class Ranks:
    """Holds heartbeats of some ranks, and the time of each status update."""

    def __init__(self, patch: pytest.MonkeyPatch, num_ranks: int) -> None:
        self.now = 0.0
        patch.setattr(heartbeat.time, "monotonic", lambda: self.now)
        self.beats = [Heartbeat(1, 0, 1, "starting", False) for _ in range(num_ranks)]
        self.statuses = RankStatuses(self.beats, 1.0)

    def step(self, seconds: int, alive: tuple[int, ...], **changes: bool) -> None:
        for _ in range(seconds):
            self.now += 1
            for rank in alive:
                self.beats[rank] = self.beats[rank]._replace(number=self.beats[rank].number + 1, **changes)
            self.statuses.update(self.beats)


def test_a_heartbeat_survives_the_store() -> None:
    beat = Heartbeat(3, 17, 812, "reading data", True, "ending")
    assert Heartbeat.decode(beat.encode()) == Heartbeat.decode(beat.encode().encode()) == beat


def test_an_old_heartbeat_that_was_written_again_is_no_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a rank that is reported as lost because an attacker repeats its old, validly signed values."""
    ranks = Ranks(monkeypatch, 3)
    old = ranks.beats[2]
    ranks.step(3, (0, 1, 2))
    ranks.beats[2] = old
    with pytest.raises(ForgedValueError, match=r"heartbeat 1 of rank 2 after 4\. A program on the network"):
        ranks.statuses.update(ranks.beats)


@pytest.mark.parametrize(("seconds", "slept"), [(1.0, 0.0), (2.0, 0.0), (61.0, 60.0)])
def test_only_a_long_excess_is_sleep(seconds: float, slept: float) -> None:
    assert find_sleep(seconds, 1.0) == slept


def test_a_silent_rank_is_lost_and_was_not_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that the age of a rank's progress stops with its heartbeats, because later progress is unknown."""
    ranks = Ranks(monkeypatch, 3)
    numbers = ranks.statuses.beat_numbers()
    ranks.step(5, (0, 1), is_waiting=True)
    assert ranks.statuses.find_lost(4) == ranks.statuses.find_silent(numbers) == [2]
    assert ranks.statuses.find_behind(3) == []
    assert ranks.statuses.count_waiting() == 2


def test_a_busy_rank_is_behind_only_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 2)
    ranks.step(10, (0, 1))
    assert ranks.statuses.find_behind(5) == []
    ranks.step(4, (0,), is_waiting=True)
    ranks.step(6, (0, 1))
    ranks.beats[0] = ranks.beats[0]._replace(is_waiting=True)
    assert ranks.statuses.find_behind(5) == [1]
    assert ranks.statuses.describe(1) == "step 1, starting, for 20 s"


def test_the_least_advanced_have_begun_the_fewest_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(monkeypatch, 3)
    assert ranks.statuses.find_least_advanced() == []
    ranks.beats = [beat._replace(changes=changes) for beat, changes in zip(ranks.beats, (4, 3, 4), strict=True)]
    ranks.step(1, (0, 1, 2))
    assert ranks.statuses.find_least_advanced() == [1]
