"""Detects from the ranks' heartbeats that a run has failed, and finds the cause."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from beit3_ds.config import ParallelConfig
from beit3_ds.runtime.heartbeat import RankStatuses

BEAT_REQUEST_SECONDS = 5.0
"""Time limit in seconds for a rank to answer a request for a heartbeat."""
_LISTED = 8


class Failure(NamedTuple):
    """Describes a failure after which all ranks must end."""

    text: str
    """One line that describes the failure."""
    dump_stacks: bool = False
    """Whether all ranks print the stacks of their threads before they end."""


class FailureDetector:
    """Runs on rank 0, and detects failures of ranks from the heartbeats that all ranks send.

    `Watchdog` lists the kinds of failures. This class detects all of them except a store that does not answer.
    """

    def __init__(self, parallel: ParallelConfig, statuses: RankStatuses, describe: Callable[[int], str]) -> None:
        """Creates the detector on rank 0.

        Args:
            parallel: config with the timeouts.
            statuses: statuses of all ranks, which the caller keeps up to date.
            describe: function that returns a rank's number, coordinates and host as text.
        """
        self._parallel, self._statuses, self._describe = parallel, statuses, describe
        self._request: tuple[float, list[int]] | None = None
        """Monotonic time when all ranks were asked for a heartbeat, and the sequence number of each rank's newest
        heartbeat at that time; None until the ranks are asked."""
        self._slow: dict[int, float] = {}

    def find_failure(self, reported: str | None, are_beats_requested: bool) -> Failure | None:
        """Returns the failure for which the run must end now, or None.

        Args:
            reported: first error that a rank reported about itself; None without such an error.
            are_beats_requested: whether all ranks were asked for a heartbeat. They are asked after a collective has
                failed on one rank.
        """
        statuses, parallel = self._statuses, self._parallel
        if reported is not None:
            return Failure(reported)
        if are_beats_requested:
            self._request = self._request or (time.monotonic(), statuses.beat_numbers())
            since, numbers = self._request
            silent = statuses.find_silent(numbers)
            if silent and time.monotonic() - since <= BEAT_REQUEST_SECONDS:
                return None
            return self._lost(silent) if silent else self._unexplained()
        if lost := statuses.find_lost(parallel.heartbeat_timeout_seconds):
            return self._lost(lost)
        if stalled := statuses.find_behind(parallel.timeout_seconds):
            return self._stalled(stalled)
        return None

    def describe_slow(self) -> list[str]:
        """Returns one line for each slow rank that is due for a report, at most 8 lines; a rank is slow if other ranks
        wait for it.

        A rank is due when its delay reaches `heartbeat_timeout_seconds`, and again each time the delay has doubled. If
        more than 8 ranks are due, only the 8 lowest ranks get a line, and the others are not reported until their delay
        has doubled.
        """
        first = self._parallel.heartbeat_timeout_seconds
        behind = self._statuses.find_behind(first)
        self._slow = {rank: self._slow.get(rank, first) for rank in behind}
        due = [rank for rank in behind if rank in self._statuses.find_behind(self._slow[rank])]
        self._slow.update({rank: 2 * self._slow[rank] for rank in due})
        return [
            f"slow: {self._describe(rank)} is in {self._statuses.describe(rank)}; {self._waiting()} for it. The run "
            f"ends once that lasts longer than parallel.timeout_seconds={self._parallel.timeout_seconds}"
            for rank in due[:_LISTED]
        ]

    def _unexplained(self) -> Failure:
        """Returns the failure to report in the following case: a collective failed, but all ranks answer the request
        for a heartbeat.

        The usual cause is a timeout of the collective.
        """
        seconds = self._parallel.timeout_seconds
        if stalled := self._statuses.find_behind(seconds / 2):
            return self._stalled(stalled)
        least = self._statuses.find_least_advanced()
        behind = f". Least advanced: {self._describe_all(least)}" if least else ""
        return Failure(
            f"ranks lost contact or waited longer than parallel.timeout_seconds={seconds}, though all still answer"
            f"{behind}. The stacks in the ranks' outputs show where they are",
            dump_stacks=True,
        )

    def _stalled(self, ranks: Sequence[int]) -> Failure:
        where = "; ".join(f"{self._describe(rank)} is in {self._statuses.describe(rank)}" for rank in ranks[:_LISTED])
        return Failure(
            f"stalled: {where}{_more(ranks)}; {self._waiting()} for it. Its threads answer: the stacks in its output "
            "show where it is",
            dump_stacks=True,
        )

    def _lost(self, ranks: Sequence[int]) -> Failure:
        return Failure(f"{self._describe_all(ranks)} does not answer")

    def _describe_all(self, ranks: Sequence[int]) -> str:
        return ", ".join(self._describe(rank) for rank in ranks[:_LISTED]) + _more(ranks)

    def _waiting(self) -> str:
        number = self._statuses.count_waiting()
        return "1 rank waits" if number == 1 else f"{number} ranks wait"


def _more(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - _LISTED} more ranks" if len(ranks) > _LISTED else ""
