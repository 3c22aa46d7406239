"""Describes one attempt at a run: the processes to start, and the outcome of the attempt.

The launcher starts one guard process per rank, and the guard starts the rank's training process.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.guarded_rank import AttemptFailure


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """Holds the commands, hosts, folders and time limits of one attempt to run the training."""

    hosts: Sequence[HostSlots]
    """Hosts and their numbers of slots, in the order of the ranks."""
    build_commands: Callable[[list[str]], list[list[str]]]
    """Function that takes the command-line arguments of the guards, and returns the commands of DeepSpeed's launcher.
    Together, these commands start one guard for each rank. A guard is the parent of a training process."""
    launcher_environment: Mapping[str, str]
    """Complete environment of the commands that `build_commands` returns."""
    trainer: Sequence[str]
    """Training command that every rank runs."""
    environment: Mapping[str, str]
    """Environment variables for the training processes. They are added to the launcher's variables, and replace those
    with the same names."""
    folder: Path
    """Working directory of the training processes on all hosts."""
    log_dir: Path
    """Folder for the logs of this attempt, on storage that all hosts share."""
    address: str
    """Address of this machine. The guards, which are the parents of the training processes, connect to this address."""
    port: int
    """Port on which `beit3 launch` accepts connections of the guards; 0 means any free port. A guard is the parent of a
    training process."""
    keepalive_seconds: float
    """Seconds without a message after which `beit3 launch` and a host consider each other lost."""
    start_seconds: float
    """Maximum seconds from the start of DeepSpeed's launcher until the guards of all ranks have connected to `beit3
    launch`. A guard is the parent of a training process."""

    @property
    def world_size(self) -> int:
        """Returns the number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    def host_of(self, rank: int) -> str:
        """Returns the name of the host that should run a rank, as written in the hostfile."""
        names = [host.name for host in self.hosts for _ in range(host.slots)]
        return names[rank]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Holds the result of an attempt. All ranks on reachable hosts have already ended."""

    failure: AttemptFailure | None
    """Failure that ended the attempt; None if no rank failed."""
    is_user_error: bool
    """Whether a rank ended with status 2, which means a mistake that only the user can fix."""
    lost_hosts: frozenset[str]
    """Names of the hosts of all ranks that lost their connection to `beit3 launch` or never opened one."""
    clear_at: float
    """Monotonic time in seconds after which no training process can still run on a lost host."""
