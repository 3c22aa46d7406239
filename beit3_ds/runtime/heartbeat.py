"""The signs of life of all ranks, and what follows from them."""

import json
import time
from collections.abc import Sequence
from typing import NamedTuple


class Heartbeat(NamedTuple):
    """What a rank says of itself every few seconds."""

    number: int
    """Grows with every beat: the thread lives."""
    changes: int
    """Grows with every phase of the main thread (`Activity.changes`): the rank gets on."""
    step: int
    """That the main thread is in, from 1."""
    phase: str
    """Of the step."""
    waits: bool
    """Whether the main thread waits for other ranks."""
    state: str = "running"
    """"running"; "ending" once it has read why the run ends; "left" once it needs no watching any more."""

    def encode(self) -> str:
        """As one string."""
        return json.dumps(self)

    @staticmethod
    def decode(text: str | bytes) -> "Heartbeat":
        """Reads what `encode` wrote."""
        return Heartbeat(*json.loads(text))


def find_sleep(seconds: float, interval: float) -> float:
    """For how long this process was stopped, or not given a core, if it meant to wait `interval` and it took `seconds`.

    What others did in that time it cannot know: perhaps all were stopped, as by a cluster that suspends a job.
    """
    return seconds - interval if seconds > 2 * interval else 0.0


class _RankStatus:
    """What is known of one rank."""

    def __init__(self, beat: Heartbeat, now: float) -> None:
        self.beat, self.heard, self.unchanged_since = beat, now, now


class RankStatuses:
    """How long ago each rank gave a sign of life, and how long its main thread has been where it is.

    A rank is *lost* if its thread no longer beats: its process was stopped or killed, or its host or the link is down.
    A rank whose thread beats is *behind* if its main thread neither gets on nor waits for others, while others wait.
    Ages count from when this process noticed, so no two clocks are compared.
    """

    def __init__(self, beats: Sequence[Heartbeat], interval: float) -> None:
        """Takes the first beats, rank by rank.

        Args:
            beats: of all ranks.
            interval: seconds between two calls of `update`; ages do not grow by what this process sleeps beyond them.
        """
        self._interval, self._updated = interval, time.monotonic()
        self._ranks = [_RankStatus(beat, self._updated) for beat in beats]

    def update(self, beats: Sequence[Heartbeat]) -> None:
        """Takes the newest beats, rank by rank."""
        now = time.monotonic()
        slept = find_sleep(now - self._updated, self._interval)
        self._updated = now
        for standing, beat in zip(self._ranks, beats, strict=True):
            before, standing.beat = standing.beat, beat
            standing.heard += slept
            standing.unchanged_since += slept
            if beat.number != before.number:
                standing.heard = now
            if (beat.changes, beat.waits) != (before.changes, before.waits):
                standing.unchanged_since = now

    def find_lost(self, seconds: float) -> list[int]:
        """Ranks that have not left and gave no sign of life for so long."""
        return [
            rank
            for rank, standing in enumerate(self._ranks)
            if standing.beat.state != "left" and self._updated - standing.heard > seconds
        ]

    def find_behind(self, seconds: float) -> list[int]:
        """Ranks that neither got on nor waited for so long, if others waited for at least half as long."""
        if not any(standing.beat.waits and self._age(standing) > seconds / 2 for standing in self._ranks):
            return []
        return [
            rank
            for rank, standing in enumerate(self._ranks)
            if not standing.beat.waits and standing.beat.state == "running" and self._age(standing) > seconds
        ]

    def find_least_advanced(self) -> list[int]:
        """The ranks that have begun fewer phases than others; none if all are equal."""
        changes = [standing.beat.changes for standing in self._ranks]
        least = min(changes)
        return [rank for rank, own in enumerate(changes) if own == least] if least < max(changes) else []

    def count_waiting(self) -> int:
        """Ranks that wait for others."""
        return sum(standing.beat.waits for standing in self._ranks)

    def numbers(self) -> list[int]:
        """Of the newest beat of each rank."""
        return [standing.beat.number for standing in self._ranks]

    def find_silent(self, numbers: Sequence[int]) -> list[int]:
        """The ranks that have not beaten since the beat of this number, and have not left."""
        return [
            rank
            for rank, (standing, number) in enumerate(zip(self._ranks, numbers, strict=True))
            if standing.beat.number == number and standing.beat.state != "left"
        ]

    def describe(self, rank: int) -> str:
        """Where a rank's main thread is, and for how long."""
        standing = self._ranks[rank]
        beat = standing.beat
        return f"step {beat.step}, {beat.phase}, for {self._age(standing):.0f} s"

    def _age(self, standing: _RankStatus) -> float:
        """How long the rank has said that it is where it is; what it has not said since, nobody knows."""
        return standing.heard - standing.unchanged_since
