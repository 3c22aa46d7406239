"""Describes one attempt at a run: the processes to start, and the outcome."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.guarded_rank import AttemptFailure


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """Lists commands, hosts, folders and time limits of one attempt at a run."""

    hosts: Sequence[HostSlots]
    """Hosts and slots, in the order of their ranks."""
    build_commands: Callable[[list[str]], list[list[str]]]
    """Builds the commands that start a guard for every rank, from the guards' arguments."""
    launcher_environment: Mapping[str, str]
    """Complete environment of the commands from `build_commands`."""
    trainer: Sequence[str]
    """Command of every rank."""
    environment: Mapping[str, str]
    """Additional variables of the trainers; they override the launcher's, such as MASTER_ADDR."""
    folder: Path
    """Working directory of the trainers on all hosts."""
    log_dir: Path
    """Log folder of this attempt, on storage that all hosts share."""
    address: str
    """Address of this machine that the hosts connect to."""
    port: int
    """Port on which the supervisor listens; 0 for any free port."""
    keepalive_seconds: float
    """Seconds without a message after which a host, or for a guard its supervisor, counts as lost."""
    start_seconds: float
    """Longest time in seconds until all guards have registered."""

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
    """Holds the result of an attempt, after its ranks are gone from every host that can be reached."""

    failure: AttemptFailure | None
    """First failure, if any."""
    is_user_error: bool
    """Whether a rank ended with status 2, for a mistake that only the user can fix."""
    lost_hosts: frozenset[str]
    """Hosts of the hostfile that stopped sending messages, or whose guards did not register."""
    clear_at: float
    """Time on the monotonic clock after which lost guards have certainly ended their trainers."""
