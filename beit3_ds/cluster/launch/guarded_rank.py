"""Tracks the state of one rank for `beit3 launch`, and describes how the rank ended."""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from beit3_ds.cluster.launch.messages import Channel, Ended, Register
from beit3_ds.cluster.launch.terminal import last_lines

STOPPED_SECONDS = 10.0
"""Seconds after which a stopped training process (state T) counts as failed."""

_ERROR_PREFIXES = ("error on rank ", "error: ")


@dataclass(frozen=True, kw_only=True)
class AttemptFailure:
    """Describes the failure that ended one attempt to run the training."""

    text: str
    """Message with the rank, the host and the kind of failure; it has no full stop."""
    lines: tuple[str, ...] = ()
    """Lines of output that explain the failure (`select_explanation`)."""
    log: Path | None = None
    """Log file with the rank's whole output."""
    rank: int | None = None
    """Rank that failed; None if the failure concerns no single rank."""
    is_consequence: bool = False
    """Whether this failure may be a consequence of another rank's failure. True if `rank` ended with status 1."""


@dataclass(kw_only=True)
class GuardedRank:
    """Holds the state of one rank whose guard has connected to `beit3 launch`. The guard is the parent of the rank's
    training process.
    """

    registered: Register
    channel: Channel
    log: Path
    """Log file with the output of the training process."""
    ended: Ended | None = None
    """The guard's message about the end of the training process; None while the training process runs."""
    is_lost: bool = False
    """Whether the rank's guard has disconnected or has been silent for too long."""
    is_killed: bool = False
    """Whether `beit3 launch` has told the guard to kill the training process."""
    state: str = ""
    """State of the training process as a letter from /proc, such as T for stopped; empty if unknown."""
    state_since: float = field(default_factory=time.monotonic)

    @property
    def rank(self) -> int:
        """Returns the rank's number."""
        return self.registered.rank

    @property
    def name(self) -> str:
        """Returns the rank and its host as text for messages."""
        return f"rank {self.registered.rank} on host {self.registered.host}"

    @property
    def is_gone(self) -> bool:
        """Returns whether the training process has ended or the rank's guard is lost."""
        return self.ended is not None or self.is_lost

    @property
    def silence(self) -> float:
        """Returns the seconds since the last message from the rank's guard."""
        return time.monotonic() - self.channel.last_heard

    def record_state(self, state: str) -> None:
        """Records the training process's state from a keepalive message."""
        if state != self.state:
            self.state, self.state_since = state, time.monotonic()

    def is_stopped(self) -> bool:
        """Returns whether the training process has been stopped (state T) for longer than `STOPPED_SECONDS`."""
        return self.state == "T" and not self.is_gone and time.monotonic() - self.state_since > STOPPED_SECONDS

    def describe_end(self) -> str:
        """Describes how the training process ended, for example "ended with status 1"."""
        if self.ended is None:
            return "was lost" if self.is_lost else "still runs"
        if self.ended.error:
            return self.ended.error
        if self.ended.status is None:
            return "was not started"
        is_ours = self.is_killed and self.ended.status == -signal.SIGKILL
        return describe_status(self.ended.status) + (" by the launcher" if is_ours else "")

    def failure(self, text: str) -> AttemptFailure:
        """Builds a failure of this rank, with the lines of its output that explain the failure."""
        lines = self.ended.lines if self.ended is not None else last_lines(self.log)
        return AttemptFailure(
            text=f"{self.name} {text}",
            lines=tuple(select_explanation(lines, otherwise=lines)),
            log=self.log,
            rank=self.rank,
            is_consequence=self.ended is not None and self.ended.status == 1,
        )


def select_explanation(lines: Sequence[str], otherwise: Sequence[str]) -> Sequence[str]:
    """Returns the end of a rank's output, starting at the last error message of this project.

    Args:
        lines: last lines that the rank printed.
        otherwise: the result if `lines` contains no such message.
    """
    starts = [index for index, line in enumerate(lines) if line.startswith(_ERROR_PREFIXES)]
    return lines[starts[-1] :] if starts else otherwise


def describe_status(status: int) -> str:
    """Describes how a process ended, for example "was killed by SIGKILL".

    Args:
        status: exit status, or minus the number of the signal that killed the process.
    """
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
