"""Builds the commands that run DeepSpeed's launcher, which starts one guard (`rank_guard`) per rank.

A guard is the parent of the training process. The launcher passes the guard's command to shells on the hosts. So the
guard's command contains only words that no shell changes (`plain_words`).
"""

import base64
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from beit3_ds.cluster.hostfile import Hostfile
from beit3_ds.cluster.launch.plain_words import check_plain_word, is_plain_word
from beit3_ds.config import ConfigError

Launcher = Literal["pdsh", "ssh", "openmpi", "mpich", "slurm"]
LAUNCHERS: tuple[Launcher, ...] = ("pdsh", "ssh", "openmpi", "mpich", "slurm")
EQUAL_SLOTS: tuple[Launcher, ...] = ("mpich", "slurm")
"""Launchers that start the same number of ranks on every host."""
LAUNCHER_FOLDER = Path("/")
"""Working directory of the launcher's commands. DeepSpeed writes this path into the hosts' command lines, so the path
must contain no special characters."""

_GUARD = "beit3_ds.cluster.launch.rank_guard"
_GUARD_FILE = Path(__file__).with_name("rank_guard.py")
_SSH_OPTIONS = (
    *("-o", "BatchMode=yes"),
    *("-o", "ConnectTimeout=10"),
    *("-o", "ServerAliveInterval=5"),  # so that ssh ends when its host is gone
    *("-o", "ServerAliveCountMax=3"),
)
_COMMAND_LINE_VARIABLES = ("PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE", "LD_LIBRARY_PATH")
"""Environment variables without which a guard (`rank_guard`) may fail to start. Launchers write these variables into
the commands that shells on the hosts run, so the values must contain no special characters."""
_NAMES = frozenset(
    {
        *("HOME", "USER", "LOGNAME", "SHELL", "TERM", "LANG", "LC_ALL", "TZ", "TMPDIR", "PATH", "VIRTUAL_ENV"),
        *("SSH_AUTH_SOCK", "SSH_AGENT_PID", "KRB5CCNAME", "XDG_RUNTIME_DIR", "DS_ACCELERATOR", "WCOLL"),
    }
)
_OF_PROCESS_MANAGERS = (
    *("SLURM_", "PBS_", "LSB_", "FLUX_", "PDSH_"),
    *("OMPI_", "OPAL_", "PMIX_", "PRTE_", "PMI_", "HYDRA_", "MPIEXEC_", "I_MPI_", "PALS_"),
)
"""Prefixes of the environment variables that configure srun, mpirun and pdsh."""
_SECRETS_OF_PROCESS_MANAGERS = frozenset({"SLURM_JWT"})
_PDSH_SSH_OPTIONS = ("PDSH_SSH_ARGS", "PDSH_SSH_ARGS_APPEND")


def build_commands(launcher: Launcher, hostfile: Hostfile, guard: Sequence[str]) -> list[list[str]]:
    """Returns the commands that start DeepSpeed's launcher.

    The backend "ssh" needs one command per host. Every other backend needs a single command.

    Args:
        launcher: backend of DeepSpeed's launcher; ignored if this machine is the only host.
        hostfile: hostfile whose path contains only plain characters (`plain_words`).
        guard: command-line arguments of the guards (`guard_arguments`).
    """
    first = hostfile.hosts[0].name
    # Guards get rank 0's address from the supervisor (`Attempt`). Without --master_addr DeepSpeed would ask for it over
    # ssh.
    common = [*_runner(), "--hostfile", str(hostfile.path), "--master_addr", first, "--no_ssh_check"]
    per_host = ["--no_local_rank", "--module", _GUARD, *guard]
    if hostfile.is_local:
        return [[*common, *per_host]]
    for word in guard:
        check_plain_word(word, "an argument of the guards", "Reach the hosts through another network.")
    if launcher == "pdsh":
        return [[*common, "--force_multi", "--launcher", "pdsh", *per_host]]
    if launcher == "ssh":
        return [
            ["ssh", *_SSH_OPTIONS, host.name, " ".join(_host_command(hostfile, index, per_host))]
            for index, host in enumerate(hostfile.hosts)
        ]
    if launcher == "openmpi":
        arguments = "--launcher_args=--bind-to none"  # otherwise mpirun binds each rank to one core
        return [[*common, "--force_multi", "--launcher", "openmpi", arguments, "--module", _GUARD, *guard]]
    # DeepSpeed omits --module from its commands for the other two backends, or puts it where it has no effect.
    options: list[str] = []
    if launcher == "slurm":
        arguments = f"--launcher_args=--ntasks-per-node={hostfile.hosts[0].slots} --cpu-bind=none"
        options = ["--include", "@".join(hostfile.names), arguments]
    return [[*common, "--force_multi", "--launcher", launcher, *options, str(_GUARD_FILE), *guard]]


def guard_arguments(address: str, port: int, token: Path, keepalive_seconds: float) -> list[str]:
    """Returns the command-line arguments of the guards (`rank_guard.main`).

    The path of the token's file is written in hexadecimal.
    """
    # The token's path may have any characters, and shells on the hosts read these arguments.
    values = {"address": address, "port": port, "token": os.fsencode(token).hex(), "keepalive": keepalive_seconds}
    return [f"--{name}={value}" for name, value in values.items()]


def launcher_environment(launcher: Launcher, environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment variables for the commands that start DeepSpeed's launcher.

    Secrets are left out, because some launchers pass their environment to the hosts. Folders whose names contain
    special characters are removed from PATH.
    """
    kept = {
        name: value
        for name, value in environment.items()
        if name in (*_NAMES, *_COMMAND_LINE_VARIABLES)
        or (name.startswith(_OF_PROCESS_MANAGERS) and name not in _SECRETS_OF_PROCESS_MANAGERS)
    }
    # Open MPI's wheel installs its programs beside this python.
    folders = [str(Path(sys.executable).parent), *environment.get("PATH", os.defpath).split(os.pathsep)]
    kept["PATH"] = os.pathsep.join(filter(is_plain_word, folders))
    kept["DS_ENV_FILE"] = os.devnull  # or DeepSpeed writes .deepspeed_env into hosts' command lines
    if launcher == "pdsh":
        options = environment.get("PDSH_SSH_ARGS_APPEND", "")
        kept["PDSH_SSH_ARGS_APPEND"] = f"{options} {' '.join(_SSH_OPTIONS)}".strip()
    if launcher == "openmpi" and os.geteuid() == 0:
        kept |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return kept


def check_launcher(
    launcher: Launcher, hostfile: Hostfile, environment: Mapping[str, str], find: Callable[[str], str | None]
) -> None:
    """Checks that DeepSpeed's launcher can use a hostfile, and that shells do not change the launcher's commands.

    Args:
        launcher: backend of DeepSpeed's launcher.
        hostfile: hostfile of the run.
        environment: environment of the launcher's commands (`launcher_environment`).
        find: function that returns the path of a program or None, like `shutil.which`.

    Raises:
        ConfigError: if the backend's program is not installed; if the hosts in the hostfile have different numbers of
            ranks and the backend does not support this; or if a path or variable in the hosts' command lines contains a
            character that shells change.
    """
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
    _check_words(launcher, environment)


def _check_words(launcher: Launcher, environment: Mapping[str, str]) -> None:
    move = "Install it in a folder whose path has letters, digits and ./_-+=@:, only."
    check_plain_word(sys.executable, "the path of this Python", move)
    if launcher in EQUAL_SLOTS:
        check_plain_word(str(_GUARD_FILE), "the folder of beit3_ds", move)
    if launcher == "mpich":
        found = importlib.util.find_spec("deepspeed")
        check_plain_word(os.path.realpath(found.origin or "") if found else "", "the folder of DeepSpeed", move)
    for name in _COMMAND_LINE_VARIABLES:
        if environment.get(name):
            check_plain_word(environment[name], name, "Unset it, or rename the folder.")
    for name in _PDSH_SSH_OPTIONS if launcher == "pdsh" else ():
        for word in environment.get(name, "").split(" "):
            if word.strip("%"):
                check_plain_word(word.replace("%", ""), name, "Write options of ssh into ~/.ssh/config.")


def _runner() -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner"]


def _host_command(hostfile: Hostfile, index: int, per_host: Sequence[str]) -> list[str]:
    """Returns the command that runs DeepSpeed's launcher on one host.

    The launcher starts one guard (`rank_guard`) for each rank of the host.
    """
    slots = {host.name: list(range(host.slots)) for host in hostfile.hosts}
    variables = [f"{name}={value}" for name in _COMMAND_LINE_VARIABLES if (value := os.environ.get(name))]
    return [
        *("exec", "env", *variables, sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
        f"--world_info={base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()}",
        *(f"--node_rank={index}", f"--master_addr={hostfile.hosts[0].name}", *per_host),
    ]
