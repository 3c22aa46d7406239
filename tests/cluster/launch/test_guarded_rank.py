"""Tests how the end of a rank is described, and when a stopped trainer counts as failed."""

import signal
import time
from pathlib import Path
from unittest.mock import Mock

import pytest

from beit3_ds.cluster.launch import guarded_rank
from beit3_ds.cluster.launch.guarded_rank import GuardedRank
from beit3_ds.cluster.launch.messages import Ended, Register


@pytest.fixture
def rank(tmp_path: Path) -> GuardedRank:
    (tmp_path / "rank_3.log").write_text("last words\n")
    registered = Register(rank=3, local_rank=1, host="node0", pid=1, address="10.0.0.1", free_port=1)
    return GuardedRank(registered=registered, channel=Mock(last_heard=time.monotonic()), log=tmp_path / "rank_3.log")


@pytest.mark.parametrize(
    ("status", "killed", "words"),
    [
        (0, False, "ended with status 0"),
        (None, False, "was not started"),
        (-signal.SIGKILL, False, "was killed by SIGKILL"),
        (-signal.SIGKILL, True, "was killed by SIGKILL by the launcher"),
        (-signal.SIGSEGV, True, "was killed by SIGSEGV"),  # before the launcher's kill reached it
        (-99, False, "was killed by signal 99"),
    ],
)
def test_ends_are_described(rank: GuardedRank, status: int | None, killed: bool, words: str) -> None:
    rank.ended, rank.is_killed = Ended(status=status, lines=[]), killed
    assert rank.is_gone and rank.describe_end() == words


def test_a_rank_that_has_not_ended_runs_or_is_lost(rank: GuardedRank) -> None:
    assert not rank.is_gone and rank.describe_end() == "still runs"
    rank.is_lost = True
    assert rank.is_gone and rank.describe_end() == "was lost"


def test_a_failure_has_the_guards_lines_or_those_of_the_log(rank: GuardedRank) -> None:
    failure = rank.failure("was lost")
    assert failure.text == "rank 3 on host node0 was lost" and failure.lines == ("last words",)
    assert not failure.is_consequence
    rank.ended = Ended(status=1, lines=["error on rank 3"])
    failure = rank.failure("ended with status 1")
    assert failure.lines == ("error on rank 3",) and failure.is_consequence  # ranks end so after another's failure


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        (["Traceback", "KeyError: 1"], ["Traceback", "KeyError: 1"]),
        (["stacks", "Traceback", "error on rank 3: ranks lost contact"], ["error on rank 3: ranks lost contact"]),
        (["error: disk full", "error on rank 3: config", "key x"], ["error on rank 3: config", "key x"]),
        (
            ["error on rank 3: no save", "Traceback", "KeyError: 1"],
            ["error on rank 3: no save", "Traceback", "KeyError: 1"],
        ),
        (["an error on rank 3"], ["an error on rank 3"]),
        ([], []),
    ],
)
def test_a_failure_shows_the_last_error_message_and_what_follows(
    rank: GuardedRank, lines: list[str], shown: list[str]
) -> None:
    rank.ended = Ended(status=1, lines=lines)
    assert rank.failure("ended with status 1").lines == tuple(shown)


def test_only_a_trainer_that_stays_stopped_has_failed(rank: GuardedRank, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(guarded_rank.time, "monotonic", lambda: now)
    rank.record_state("T")
    now += guarded_rank.STOPPED_SECONDS + 1
    assert rank.is_stopped()
    rank.record_state("R")
    rank.record_state("T")  # stopped again: the time starts again
    assert not rank.is_stopped()
