"""Builds the commands with which DeepSpeed's launcher starts a guard for every rank, for each of its backends."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from beit3_ds.cluster.hostfile import Hostfile
from beit3_ds.config import ConfigError

Launcher = Literal["pdsh", "ssh", "openmpi", "mpich", "slurm"]
LAUNCHERS: tuple[Launcher, ...] = ("pdsh", "ssh", "openmpi", "mpich", "slurm")
EQUAL_SLOTS: tuple[Launcher, ...] = ("mpich", "slurm")
"""Backends that start the same number of ranks on every host."""

_GUARD = "beit3_ds.cluster.launch.rank_guard"
_GUARD_FILE = Path(__file__).with_name("rank_guard.py")
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),  # so that ssh ends when its host is gone
    *("-o", "ServerAliveCountMax=3"),
)
_ENVIRONMENT_FILE = ".deepspeed_env"


def build_commands(launcher: Launcher, hostfile: Hostfile, guard: Sequence[str]) -> list[list[str]]:
    """Returns the commands that start DeepSpeed's launcher: one command, or with plain ssh one per host.

    Args:
        launcher: the launcher's backend; not used if this machine is the only host.
        hostfile: hostfile at a path that all hosts can read.
        guard: arguments of the guards.
    """
    first = hostfile.hosts[0].name
    # Guards get rank 0's address from the supervisor (`Attempt`). Without --master_addr DeepSpeed would ask for it over
    # ssh.
    common = [*_runner(), "--hostfile", str(hostfile.path), "--master_addr", first, "--no_ssh_check"]
    per_host = ["--no_local_rank", "--module", _GUARD, *guard]
    if hostfile.is_local:
        return [[*common, *per_host]]
    if launcher == "pdsh":
        return [[*common, "--force_multi", "--launcher", "pdsh", *per_host]]
    if launcher == "ssh":
        return [
            ["ssh", *_SSH_OPTIONS, host.name, _remote([*common, "--no_ssh", f"--node_rank={index}", *per_host])]
            for index, host in enumerate(hostfile.hosts)
        ]
    if launcher == "openmpi":
        arguments = "--launcher_args=--bind-to none"  # otherwise each rank gets one core
        return [[*common, "--force_multi", "--launcher", "openmpi", arguments, "--module", _GUARD, *guard]]
    # DeepSpeed omits --module from its commands for the other two backends, or puts it where it has no effect.
    options: list[str] = []
    if launcher == "slurm":
        arguments = f"--launcher_args=--ntasks-per-node={hostfile.hosts[0].slots} --cpu-bind=none"
        options = ["--include", "@".join(hostfile.names), arguments]
    return [[*common, "--force_multi", "--launcher", launcher, *options, str(_GUARD_FILE), *guard]]


def launcher_environment(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of the launcher's commands: this one, with the changes that the backend needs."""
    changed = dict(environment)
    # Open MPI's wheel installs its programs beside this python.
    changed["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", os.defpath)])
    if launcher == "pdsh":
        options = environment.get("PDSH_SSH_ARGS_APPEND", "")
        changed["PDSH_SSH_ARGS_APPEND"] = f"{options} {' '.join(_SSH_OPTIONS)}".strip()
    if launcher == "openmpi" and os.geteuid() == 0:
        changed |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return changed


def check_launcher(launcher: Launcher, hostfile: Hostfile, find: Callable[[str], str | None]) -> None:
    """Refuses hostfiles and options that DeepSpeed's launcher could not run.

    Args:
        launcher: the launcher's backend.
        hostfile: hostfile of the run.
        find: returns the path of a program, or None, as `shutil.which` does.

    Raises:
        ConfigError: if the backend's program is not installed or cannot start different numbers of ranks, or if
            DeepSpeed's environment file has a line at which its launcher crashes.
    """
    _check_environment_files()
    if hostfile.is_local:
        return
    program = {"pdsh": "pdsh", "ssh": "ssh", "openmpi": "ompi_info", "mpich": "mpirun", "slurm": "sinfo"}[launcher]
    if find(program) is None:
        others = [name for name in LAUNCHERS if name != launcher]
        raise ConfigError(
            f"--launcher {launcher} needs the program {program}, which is not in PATH. Install it, or use one of "
            f"{', '.join(others)}; ssh needs nothing else."
        )
    if launcher in EQUAL_SLOTS and len({host.slots for host in hostfile.hosts}) > 1:
        raise ConfigError(
            f"--launcher {launcher} starts the same number of ranks on every host, but hostfile {hostfile.path} has "
            f"{', '.join(f'{host.name} slots={host.slots}' for host in hostfile.hosts)}. Make them equal, or use pdsh, "
            "ssh or openmpi."
        )


def _check_environment_files() -> None:
    name = os.environ.get("DS_ENV_FILE", _ENVIRONMENT_FILE)
    for folder in (Path.home(), Path()):
        path = folder / name
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if "=" not in line:
                raise ConfigError(
                    f"{path.absolute()}, line {number}: {line!r} is not NAME=VALUE, and DeepSpeed's launcher crashes "
                    "at it. Delete the line, and all blank lines and comments, or the file: `beit3 launch` forwards "
                    "the environment by itself (--env)."
                )


def _runner() -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def _remote(command: Sequence[str]) -> str:
    """Returns a shell line that runs a command on another host, in this working directory and with its modules."""
    path = [os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])]
    names = {"PYTHONPATH": os.pathsep.join(path)}
    exports = " ".join(f"{name}={shlex.quote(value)}" for name, value in names.items())
    return f"cd {shlex.quote(os.getcwd())} && {exports} exec {shlex.join(command)}"
