"""Describes one attempt at a run: the processes to start, and the outcome."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.guarded_rank import AttemptFailure


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """Lists the commands, hosts, folders and time limits for one attempt at a run."""

    hosts: Sequence[HostSlots]
    """Hosts and slots, in the order of their ranks."""
    build_commands: Callable[[list[str]], list[list[str]]]
    """Function that takes the guards' command-line arguments, and returns the commands that start one guard per
    rank."""
    launcher_environment: Mapping[str, str]
    """All environment variables with which the commands from `build_commands` run."""
    trainer: Sequence[str]
    """Training command that every rank runs."""
    environment: Mapping[str, str]
    """Environment variables to set for the training processes; they override variables that the launcher sets."""
    folder: Path
    """Working directory of the training processes on all hosts."""
    log_dir: Path
    """Log folder of this attempt, on storage that all hosts share."""
    address: str
    """Address of this machine, to which the guards of all ranks connect."""
    port: int
    """Port on which `beit3 launch` waits for the guards of the ranks; 0 for any free port."""
    keepalive_seconds: float
    """Seconds without a message after which `beit3 launch` and a host count each other as lost."""
    start_seconds: float
    """Longest time in seconds until the guards of all ranks have connected to `beit3 launch`."""

    @property
    def world_size(self) -> int:
        """Returns the number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    def host_of(self, rank: int) -> str:
        """Returns the host of the hostfile on which a rank should run."""
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        return names[rank]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Holds the result of an attempt, whose ranks have ended on every reachable host."""

    failure: AttemptFailure | None
    """Failure that ended the attempt; None if no rank failed."""
    is_user_error: bool
    """Whether a rank ended with status 2, for a mistake that only the user can fix."""
    lost_hosts: frozenset[str]
    """Names of hosts that stopped sending messages or whose guards never connected."""
    clear_at: float
    """Time on the monotonic clock at which the guards on lost hosts have certainly ended their training processes."""
