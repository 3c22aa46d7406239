"""Why a run must end, as far as the ranks' heartbeats tell."""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from beit3_ds.config import ParallelConfig
from beit3_ds.runtime.heartbeat import RankStatuses

CALL_SECONDS = 5.0
"""How long ranks have to beat once they are called."""
_LISTED = 8


class Verdict(NamedTuple):
    """Why the run ends."""

    text: str
    """One line for people."""
    dump: bool = False
    """Whether all ranks write the stacks of their threads first."""


class FailureDetector:
    """What rank 0 concludes from the beats of all ranks; `Watchdog` says which verdicts there are."""

    def __init__(self, parallel: ParallelConfig, standings: RankStatuses, describe: Callable[[int], str]) -> None:
        """Begins without a suspicion.

        Args:
            parallel: the time-outs.
            standings: of all ranks; kept up to date by the caller.
            describe: names a rank, its place and its host.
        """
        self._parallel, self._standings, self._describe = parallel, standings, describe
        self._call: tuple[float, list[int]] | None = None
        self._slow: dict[int, float] = {}

    def find_verdict(self, failed: str | None, is_called: bool) -> Verdict | None:
        """Why the run must end now; None if it may go on.

        Args:
            failed: what the first rank that failed said of itself, if any did.
            is_called: whether a rank has lost contact with another, so that a verdict is needed soon.
        """
        standings, parallel = self._standings, self._parallel
        if failed is not None:
            return Verdict(failed)
        if is_called:
            self._call = self._call or (time.monotonic(), standings.numbers())
            since, numbers = self._call
            silent = standings.find_silent(numbers)
            if silent and time.monotonic() - since <= CALL_SECONDS:
                return None
            return self._absent(silent) if silent else self._explain_lost_contact()
        if lost := standings.find_lost(parallel.heartbeat_timeout_seconds):
            return self._absent(lost)
        if stalled := standings.find_behind(parallel.timeout_seconds):
            return self._stalled(stalled)
        return None

    def describe_slow(self) -> list[str]:
        """A line for each rank that others wait for, and another one when that has lasted twice as long."""
        first = self._parallel.heartbeat_timeout_seconds
        behind = self._standings.find_behind(first)
        self._slow = {rank: self._slow.get(rank, first) for rank in behind}
        due = [rank for rank in behind if rank in self._standings.find_behind(self._slow[rank])]
        self._slow.update({rank: 2 * self._slow[rank] for rank in due})
        return [
            f"slow: {self._describe(rank)} is in {self._standings.describe(rank)}; {self._waiting()} for it. The run "
            f"ends once that lasts longer than parallel.timeout_seconds={self._parallel.timeout_seconds}"
            for rank in due[:_LISTED]
        ]

    def _explain_lost_contact(self) -> Verdict:
        """All ranks answer, and yet a collective has failed: most likely at its time-out."""
        seconds = self._parallel.timeout_seconds
        if stalled := self._standings.find_behind(seconds / 2):
            return self._stalled(stalled)
        least = self._standings.find_least_advanced()
        behind = f". Least advanced: {self._describe_all(least)}" if least else ""
        return Verdict(
            f"ranks lost contact or waited longer than parallel.timeout_seconds={seconds}, though all still answer"
            f"{behind}. The stacks in the ranks' outputs show where they stand",
            dump=True,
        )

    def _stalled(self, ranks: Sequence[int]) -> Verdict:
        where = "; ".join(f"{self._describe(rank)} is in {self._standings.describe(rank)}" for rank in ranks[:_LISTED])
        return Verdict(
            f"stalled: {where}{_more(ranks)}; {self._waiting()} for it. Its threads answer: the stacks in its output "
            "show where it stands",
            dump=True,
        )

    def _absent(self, ranks: Sequence[int]) -> Verdict:
        return Verdict(f"{self._describe_all(ranks)} does not answer")

    def _describe_all(self, ranks: Sequence[int]) -> str:
        return ", ".join(self._describe(rank) for rank in ranks[:_LISTED]) + _more(ranks)

    def _waiting(self) -> str:
        number = self._standings.count_waiting()
        return "1 rank waits" if number == 1 else f"{number} ranks wait"


def _more(ranks: Sequence[int]) -> str:
    return f" and {len(ranks) - _LISTED} more ranks" if len(ranks) > _LISTED else ""
