"""What the supervisor knows of one rank, and how it tells of its end."""

import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

from beit3_ds.cluster.launch.messages import Channel, Ended, Register
from beit3_ds.cluster.launch.terminal import last_lines

STOPPED_SECONDS = 10.0
"""After which a trainer that was stopped (state T) counts as failed."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What ended an attempt."""

    text: str
    """Which rank, on which host, and how; one sentence without its end."""
    lines: tuple[str, ...] = ()
    """The last that the rank has printed."""
    log: Path | None = None
    """Where more of that is."""
    rank: int | None = None
    """None if it was none."""
    is_consequence: bool = False
    """Whether ranks end like this when another one has failed: with status 1."""


@dataclass(kw_only=True)
class GuardedRank:
    """A rank whose guard has registered."""

    registered: Register
    channel: Channel
    log: Path
    """File of the trainer's output."""
    ended: Ended | None = None
    """How the trainer ended."""
    is_lost: bool = False
    """Whether the guard is gone, or silent for too long."""
    is_killed: bool = False
    """Whether the supervisor has ordered its end."""
    state: str = ""
    """Letter of the trainer's state."""
    state_since: float = field(default_factory=time.monotonic)

    @property
    def rank(self) -> int:
        """Its number."""
        return self.registered.rank

    @property
    def name(self) -> str:
        """For messages."""
        return f"rank {self.registered.rank} on host {self.registered.host}"

    @property
    def is_gone(self) -> bool:
        """Whether nothing more will be heard of the trainer."""
        return self.ended is not None or self.is_lost

    @property
    def silence(self) -> float:
        """Seconds since its guard was heard of."""
        return time.monotonic() - self.channel.last_heard

    def note_state(self, state: str) -> None:
        """Takes the letter of a heartbeat."""
        if state != self.state:
            self.state, self.state_since = state, time.monotonic()

    def is_stopped(self) -> bool:
        """Whether something has stopped the trainer, and not let it go on for too long."""
        return self.state == "T" and not self.is_gone and time.monotonic() - self.state_since > STOPPED_SECONDS

    def describe_end(self) -> str:
        """How it ended, as a predicate."""
        if self.ended is None:
            return "was lost" if self.is_lost else "still runs"
        if self.ended.error:
            return self.ended.error
        if self.ended.status is None:
            return "was not started"
        is_ours = self.is_killed and self.ended.status == -signal.SIGKILL
        return describe_status(self.ended.status) + (" by the launcher" if is_ours else "")

    def failure(self, text: str) -> Failure:
        """That something happened to this rank, with its last lines from its guard or, if that is lost, its log."""
        lines = self.ended.lines if self.ended is not None else last_lines(self.log)
        return Failure(
            text=f"{self.name} {text}",
            lines=tuple(lines),
            log=self.log,
            rank=self.rank,
            is_consequence=self.ended is not None and self.ended.status == 1,
        )


def describe_status(status: int) -> str:
    """What a status of `subprocess` means, as a predicate."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
