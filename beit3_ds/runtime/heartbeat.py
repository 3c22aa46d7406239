"""Defines the heartbeats that ranks send, and computes the status of each rank from its heartbeats."""

import json
import time
from collections.abc import Sequence
from typing import NamedTuple

from beit3_ds.runtime.keyed_store import ForgedValueError


class Heartbeat(NamedTuple):
    """Holds the state that a rank reports to rank 0 every few seconds."""

    number: int
    """Number of heartbeats sent so far. If it grows, the rank's thread that sends heartbeats is alive."""
    changes: int
    """Number of phases that the main thread has begun (`Activity.changes`). If it grows, the rank makes progress."""
    step: int
    """Number of the main thread's current step, from 1."""
    phase: str
    """Name of the main thread's current phase, such as "update"."""
    is_waiting: bool
    """Whether the main thread waits for other ranks."""
    state: str = "running"
    """State of the rank: "running", "ending" (the rank has read that the run failed), or "left" (no longer watched)."""

    def encode(self) -> str:
        """Returns the heartbeat as JSON."""
        return json.dumps(self)

    @staticmethod
    def decode(text: str | bytes) -> "Heartbeat":
        """Parses a heartbeat from the JSON that `encode` returned."""
        return Heartbeat(*json.loads(text))


def find_sleep(seconds: float, interval: float) -> float:
    """Returns for how many seconds this process was suspended during a wait; 0 for a wait of at most 2 * `interval`.

    While this process was suspended, other ranks may have been suspended too. Callers therefore do not count these
    seconds as silence of other ranks.

    Args:
        seconds: measured duration of the wait.
        interval: requested duration of the wait in seconds.
    """
    return seconds - interval if seconds > 2 * interval else 0.0


class RankStatus:
    """Holds the newest heartbeat of one rank, and two times that this process measured.

    The first is the time when this process noticed the heartbeat. The second is the time when this process noticed the
    rank's latest change. A change is the start of a phase, or the start or end of a wait.
    """

    def __init__(self, beat: Heartbeat, now: float) -> None:
        self.beat = beat
        self.beaten_at = now
        """Monotonic time in seconds when this process noticed the newest heartbeat."""
        self.unchanged_since = now
        """Monotonic time in seconds at which this process last noticed a change: the rank began a phase, began a wait
        or ended a wait."""

    @property
    def unchanged_seconds(self) -> float:
        """Returns the seconds from the rank's latest change (`unchanged_since`) to the rank's newest heartbeat."""
        return self.beaten_at - self.unchanged_since


class RankStatuses:
    """Finds out which of the watched ranks are lost and which are behind.

    A rank is *lost* if its heartbeats stop. A rank is *behind* if its main thread makes no progress while other ranks
    wait for this rank. All times are measured with this process's clock.
    """

    def __init__(self, beats: Sequence[Heartbeat], interval: float) -> None:
        """Starts with the first heartbeat of each rank.

        Args:
            beats: one heartbeat per rank.
            interval: normal seconds between two calls of `update`. If the time between two calls is much longer, this
                process was suspended, and the excess does not count as silence of the ranks.
        """
        self._interval, self._updated = interval, time.monotonic()
        self._ranks = [RankStatus(beat, self._updated) for beat in beats]

    def update(self, beats: Sequence[Heartbeat]) -> None:
        """Updates the status of each rank.

        Args:
            beats: newest heartbeat of each rank, in the order of the ranks.

        Raises:
            ForgedValueError: if a rank's heartbeat is older than the rank's previous heartbeat. Only an attacker can
                cause this.
        """
        now = time.monotonic()
        slept = find_sleep(now - self._updated, self._interval)
        self._updated = now
        for rank, (status, beat) in enumerate(zip(self._ranks, beats, strict=True)):
            before, status.beat = status.beat, beat
            if beat.number < before.number:
                raise ForgedValueError(
                    f"the store where ranks meet holds heartbeat {beat.number} of rank {rank} after {before.number}. A "
                    "program on the network writes old values again: close its port to all but the ranks' hosts"
                )
            status.beaten_at += slept
            status.unchanged_since += slept
            if beat.number != before.number:
                status.beaten_at = now
            if (beat.changes, beat.is_waiting) != (before.changes, before.is_waiting):
                status.unchanged_since = now

    def find_lost(self, seconds: float) -> list[int]:
        """Returns the ranks that are still in the run but have sent no heartbeat for longer than `seconds`."""
        return [
            rank
            for rank, status in enumerate(self._ranks)
            if status.beat.state != "left" and self._updated - status.beaten_at > seconds
        ]

    def find_behind(self, seconds: float) -> list[int]:
        """Returns the ranks that keep other ranks waiting.

        A running rank is in the list if its main thread waits for no other rank, and has made no progress for more than
        `seconds`. However, the list is empty unless some rank has been waiting for others for more than half of
        `seconds`.
        """
        if not any(status.beat.is_waiting and status.unchanged_seconds > seconds / 2 for status in self._ranks):
            return []
        return [
            rank
            for rank, status in enumerate(self._ranks)
            if not status.beat.is_waiting and status.beat.state == "running" and status.unchanged_seconds > seconds
        ]

    def find_least_advanced(self) -> list[int]:
        """Returns the ranks that have begun the fewest phases; an empty list if the number is equal on all ranks."""
        changes = [status.beat.changes for status in self._ranks]
        least = min(changes)
        return [rank for rank, own in enumerate(changes) if own == least] if least < max(changes) else []

    def count_waiting(self) -> int:
        """Returns the number of ranks that wait for other ranks."""
        return sum(status.beat.is_waiting for status in self._ranks)

    def beat_numbers(self) -> list[int]:
        """Returns the number of each rank's newest heartbeat."""
        return [status.beat.number for status in self._ranks]

    def find_silent(self, numbers: Sequence[int]) -> list[int]:
        """Returns the ranks that are still in the run but have sent no heartbeat since `numbers` was read.

        Args:
            numbers: earlier result of `beat_numbers`.
        """
        return [
            rank
            for rank, (status, number) in enumerate(zip(self._ranks, numbers, strict=True))
            if status.beat.number == number and status.beat.state != "left"
        ]

    def describe(self, rank: int) -> str:
        """Returns a text with the step and phase of a rank's main thread, and with the seconds since the rank's latest
        change (`RankStatus.unchanged_seconds`).
        """
        status = self._ranks[rank]
        return f"step {status.beat.step}, {status.beat.phase}, for {status.unchanged_seconds:.0f} s"
