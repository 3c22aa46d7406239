"""What one attempt at a run starts, and how it ended."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.guarded_rank import Failure


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """What to start, and where."""

    hosts: Sequence[HostSlots]
    """In the order of their ranks."""
    build_commands: Callable[[list[str]], list[list[str]]]
    """Makes the commands that start a guard for every rank, from the guards' own arguments."""
    launcher_environment: Mapping[str, str]
    """Of those commands, whole."""
    trainer: Sequence[str]
    """The command of every rank."""
    environment: Mapping[str, str]
    """What the trainers get beside what the launcher sets; it also overrides how they find each other."""
    folder: Path
    """To run in, on all hosts."""
    log_dir: Path
    """Of this attempt, on storage that all hosts share."""
    address: str
    """Of this machine, by which the hosts reach it."""
    port: int
    """To listen on; 0 is any."""
    keepalive_seconds: float
    """Silence after which a host is lost, and after which guards give up their supervisor."""
    start_seconds: float
    """That guards have to come."""

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return sum(host.slots for host in self.hosts)

    def host_of(self, rank: int) -> str:
        """The host of the hostfile where a rank should be."""
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        return names[rank]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How an attempt ended; no rank of it is left on any host that can be reached."""

    failure: Failure | None
    """The first, if any."""
    is_user_error: bool
    """Whether a rank ended with status 2."""
    lost_hosts: frozenset[str]
    """Hosts of the hostfile that fell silent, or where no guard came from."""
    clear_at: float
    """On the monotonic clock: when guards that were lost have ended their trainers at the latest."""
