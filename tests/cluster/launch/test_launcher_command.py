"""Tests that DeepSpeed's own parsers turn this project's launcher commands into the right processes."""

import base64
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from beit3_ds.cluster.hostfile import HostSlots, write_hostfile
from beit3_ds.cluster.launch.launcher_command import LAUNCHERS, build_commands, check_launcher, launcher_environment
from beit3_ds.config import ConfigError

GUARD = ["--address=10.0.0.1", "--port=1234", "--token=/shared/token", "--keepalive=15.0"]
HOSTS = [HostSlots("node0", 2), HostSlots("node1", 2)]

# Runs DeepSpeed's own runner with its backends' programs faked, and prints the command that it would start.
RUNNER = """
import json, shutil, subprocess, sys
from deepspeed.launcher import runner
shutil.which = lambda name: "/usr/bin/" + name
class Started:
    returncode = 0
    def __init__(self, cmd, env): print("STARTED", json.dumps(cmd))
    def wait(self): pass
subprocess.Popen = Started
runner.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Returns the command that DeepSpeed starts for each backend.

    A single process computes all commands, because imports take seconds.
    """
    folder = tmp_path_factory.mktemp("commands")
    hostfile = write_hostfile(folder / "hostfile", HOSTS)
    code, names = RUNNER.replace("runner.main(sys.argv[1:])", ""), [name for name in LAUNCHERS if name != "ssh"]
    for name in names:
        ((_, dash_m, module, *arguments),) = build_commands(name, hostfile, GUARD)
        assert (dash_m, module) == ("-m", "deepspeed.launcher.runner")
        code += f"runner.main({arguments!r})\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix("STARTED ") for line in done.stdout.splitlines() if line.startswith("STARTED ")]
    return {name: json.loads(line) for name, line in zip(names, lines, strict=True)}


def test_pdsh(started: dict[str, list[str]]) -> None:
    command = started["pdsh"]
    assert command[:1] == ["pdsh"] and command[command.index("-w") + 1] == "node0,node1"
    assert command[-5:] == ["beit3_ds.cluster.launch.rank_guard", *GUARD]
    assert "--module" in command and "--no_local_rank" in command  # which guards do not take


def test_openmpi(started: dict[str, list[str]]) -> None:
    command = started["openmpi"]
    assert command[:3] == ["mpirun", "-n", "4"]
    assert shlex.join(command[command.index("--bind-to") :]).startswith("--bind-to none")
    assert command[-8:] == [sys.executable, "-u", "-m", "beit3_ds.cluster.launch.rank_guard", *GUARD]


def test_slurm(started: dict[str, list[str]]) -> None:
    command = started["slurm"]
    assert command[:3] == ["srun", "-n", "4"]
    assert command[command.index("--nodelist") + 1] == "node0,node1"
    assert "--ntasks-per-node=2" in command and "--cpu-bind=none" in command
    assert command[-7:-5] == [sys.executable, "-u"]
    assert Path(command[-5]).name == "rank_guard.py" and Path(command[-5]).is_file() and command[-4:] == GUARD


def test_mpich(started: dict[str, list[str]]) -> None:
    """Checks only the recorded command; MPICH itself was never run."""
    command = started["mpich"]
    assert command[:5] == ["mpirun", "-n", "4", "-ppn", "2"]
    at = command.index(sys.executable)
    assert command[at + 1] == "-u" and command[at + 2].endswith("launcher_helper.py")  # with -m it would not start
    assert Path(command[-5]).is_file() and command[-4:] == GUARD


def test_ssh_starts_every_host_itself(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", HOSTS)
    commands = build_commands("ssh", hostfile, GUARD)
    assert [command[-2] for command in commands] == ["node0", "node1"]
    for index, command in enumerate(commands):
        words = command[-1].split(" ")  # plain words, without quotes
        assert words == shlex.split(command[-1]) and words[:2] == ["exec", "env"]
        assert words[words.index(sys.executable) :][:4] == [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
        (world,) = (word.removeprefix("--world_info=") for word in words if word.startswith("--world_info="))
        assert json.loads(base64.urlsafe_b64decode(world)) == {"node0": [0, 1], "node1": [0, 1]}
        assert f"--node_rank={index}" in words and "--master_addr=node0" in words
        assert words[-7:] == ["--no_local_rank", "--module", "beit3_ds.cluster.launch.rank_guard", *GUARD]


def test_what_is_not_installed_is_named(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", HOSTS)
    for launcher in LAUNCHERS:
        check_launcher(launcher, hostfile, {}, lambda name: name)
        with pytest.raises(ConfigError, match=f"--launcher {launcher} needs the program"):
            check_launcher(launcher, hostfile, {}, lambda name: None)
    check_launcher("slurm", write_hostfile(tmp_path / "local", [HostSlots("localhost", 2)]), {}, lambda name: None)


def test_unequal_slots_are_refused_where_they_do_not_work(tmp_path: Path) -> None:
    hostfile = write_hostfile(tmp_path / "hostfile", [HostSlots("node0", 2), HostSlots("node1", 1)])
    check_launcher("pdsh", hostfile, {}, lambda name: name)
    for launcher in ("mpich", "slurm"):
        with pytest.raises(ConfigError, match=r"same number of ranks on every host, .* node0 slots=2, node1 slots=1"):
            check_launcher(launcher, hostfile, {}, lambda name: name)


def test_the_launcher_keeps_the_users_own_options() -> None:
    environment = launcher_environment("pdsh", {"PDSH_SSH_ARGS_APPEND": "-p 2222", "PATH": "/bin"})
    assert environment["PDSH_SSH_ARGS_APPEND"].startswith("-p 2222 -o BatchMode=yes")
    assert environment["PATH"].endswith(":/bin")


def test_launchers_get_no_secret_and_nothing_that_deepspeed_writes_on_lines() -> None:
    """Catches variables that would appear on command lines or reach a launcher's environment.

    DeepSpeed forwards the prefixes PYTHON, MLFLOW, UCX and NCCL. The command srun forwards its whole environment.
    """
    secrets = {"HF_TOKEN": "x", "MLFLOW_TRACKING_PASSWORD": "x", "SLURM_JWT": "x", "PYTHONWARNINGS": "$(id)"}
    kept = {"HOME": "/root", "SLURM_JOB_ID": "1", "PYTHONPATH": "/x", "SSH_AUTH_SOCK": "/tmp/agent"}
    environment = launcher_environment("slurm", {**secrets, **kept, "PATH": "/bin:/a b:/c$(id)::/usr/bin"})
    path = environment.pop("PATH").split(":")
    assert path[1:] == ["/bin", "/usr/bin"]
    assert environment == {**kept, "DS_ENV_FILE": "/dev/null"}
