"""Tracks the state of one rank for `beit3 launch`, and describes how the rank ended."""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from beit3_ds.cluster.launch.messages import Channel, Ended, Register
from beit3_ds.cluster.launch.terminal import last_lines

STOPPED_SECONDS = 10.0
"""Seconds after which a stopped training process (state T) counts as failed."""


@dataclass(frozen=True, kw_only=True)
class AttemptFailure:
    """Describes the failure that ended an attempt."""

    text: str
    """Message with rank, host and kind of failure, without a full stop."""
    lines: tuple[str, ...] = ()
    """Last lines that the rank printed."""
    log: Path | None = None
    """File with the rank's whole output."""
    rank: int | None = None
    """Rank that failed; None if the failure concerns no single rank."""
    is_consequence: bool = False
    """Whether another rank's failure may have caused this one: the rank ended with status 1."""


@dataclass(kw_only=True)
class GuardedRank:
    """Holds the state of a rank whose guard (the parent of its training process) has connected."""

    registered: Register
    channel: Channel
    log: Path
    """File with the output of the training process."""
    ended: Ended | None = None
    """The guard's report of the end of the training process; None while that process runs."""
    is_lost: bool = False
    """Whether the rank's guard is gone or has been silent for too long."""
    is_killed: bool = False
    """Whether `beit3 launch` has told the guard to kill the training process."""
    state: str = ""
    """Letter of the training process's state in /proc, such as T for stopped; empty if unknown."""
    state_since: float = field(default_factory=time.monotonic)

    @property
    def rank(self) -> int:
        """Returns the rank's number."""
        return self.registered.rank

    @property
    def name(self) -> str:
        """Returns rank and host, for messages."""
        return f"rank {self.registered.rank} on host {self.registered.host}"

    @property
    def is_gone(self) -> bool:
        """Returns whether the training process has ended or is lost."""
        return self.ended is not None or self.is_lost

    @property
    def silence(self) -> float:
        """Returns the seconds since the last message of the rank's guard."""
        return time.monotonic() - self.channel.last_heard

    def record_state(self, state: str) -> None:
        """Records the state of the training process from a keepalive message."""
        if state != self.state:
            self.state, self.state_since = state, time.monotonic()

    def is_stopped(self) -> bool:
        """Returns whether the training process has been stopped (state T) for longer than `STOPPED_SECONDS`."""
        return self.state == "T" and not self.is_gone and time.monotonic() - self.state_since > STOPPED_SECONDS

    def describe_end(self) -> str:
        """Describes how the training process ended, in a phrase such as "ended with status 1"."""
        if self.ended is None:
            return "was lost" if self.is_lost else "still runs"
        if self.ended.error:
            return self.ended.error
        if self.ended.status is None:
            return "was not started"
        is_ours = self.is_killed and self.ended.status == -signal.SIGKILL
        return describe_status(self.ended.status) + (" by the launcher" if is_ours else "")

    def failure(self, text: str) -> AttemptFailure:
        """Builds a failure of this rank with the last lines of its output, from the guard's report or the log."""
        lines = self.ended.lines if self.ended is not None else last_lines(self.log)
        return AttemptFailure(
            text=f"{self.name} {text}",
            lines=tuple(lines),
            log=self.log,
            rank=self.rank,
            is_consequence=self.ended is not None and self.ended.status == 1,
        )


def describe_status(status: int) -> str:
    """Describes an exit status, or minus a signal's number, in a phrase such as "was killed by SIGKILL"."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
