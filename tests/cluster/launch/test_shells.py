"""Tests that a launcher passes every value unchanged, or that the value is refused before the launch.

No value may reach a shell as code.
"""

import contextlib
import json
import os
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beit3_ds.cluster.hostfile import HostSlots, parse_hostfile, write_hostfile
from beit3_ds.cluster.launch import launcher_command
from beit3_ds.cluster.launch.launcher_command import (
    LAUNCHERS,
    Launcher,
    build_commands,
    check_launcher,
    guard_arguments,
    launcher_environment,
)
from beit3_ds.config import ConfigError
from tests.cluster.launch import stand_ins
from tests.run_config import small_run_mapping

HOSTS = [HostSlots("node0", 1), HostSlots("node1", 1)]
MARK = "planted"
NASTY = [
    *(f"$(touch {MARK})", f"`touch {MARK}`", f"; touch {MARK} ;", f"\ntouch {MARK}\n", f'"; touch {MARK}; "'),
    *(f"'; touch {MARK}; '", f"& touch {MARK} &", f"|touch {MARK}", f"> {MARK}", f"x>{MARK}", f"<(touch {MARK})"),
    *(f"\\$(touch {MARK})", f"${{x:=$(touch {MARK})}}", "a b", "~", "*", "%n", "%h", "#", "!", "{a,b}", "é", "\udce9"),
]
texts = st.one_of(
    st.sampled_from(NASTY),
    st.text(string.printable.replace("\0", ""), min_size=1, max_size=20),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=8),
    st.builds("{}{}{}".format, st.sampled_from(["", "/x/", "-", "a="]), st.sampled_from(NASTY), st.just("/y")),
)
names = st.sampled_from(
    """PYTHONPATH PYTHONHOME PYTHONWARNINGS PATH LD_LIBRARY_PATH NCCL_DEBUG UCX_TLS MLFLOW_X MV2_X TMPDIR HOME ENV
    PDSH_SSH_ARGS_APPEND SLURM_X OMPI_X DS_ENV_FILE BASH_ENV""".split()  # noqa: SIM905
)


class Shells:
    """Runs launcher command lines in a separate folder, with an interpreter that prints its arguments."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "here"
        self.folder.mkdir()
        self._bin = folder / "bin"
        self.python = self.interpreter("plain")

    def interpreter(self, name: str) -> Path:
        """Creates an interpreter that prints its arguments, in a folder of the given name."""
        path = self._bin / name.replace("/", "") / "python"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        path.chmod(0o755)
        return path

    def run(self, program: str, words: list[str], environment: dict[str, str]) -> list[list[str]]:
        """Returns the words that the interpreter on each host received."""
        found = []
        for line, own in stand_ins.shell_lines(program, words):
            env = {**environment, **own, "PATH": f"{environment['PATH']}:/usr/bin:/bin"}
            done = subprocess.run(["sh", "-c", line], cwd=self.folder, env=env, capture_output=True, timeout=20)
            found.append([os.fsdecode(word) for word in done.stdout.splitlines()])
        return found

    def check_untouched(self) -> None:
        assert [path.name for path in self.folder.iterdir()] == []


@pytest.fixture(scope="module")
def shells(tmp_path_factory: pytest.TempPathFactory) -> Shells:
    return Shells(tmp_path_factory.mktemp("shells"))


@contextlib.contextmanager
def python_at(path: Path, environment: dict[str, str]) -> Iterator[None]:
    """Replaces `sys.executable` and the environment within the block."""
    before, variables = sys.executable, dict(os.environ)
    try:
        sys.executable = str(path)
        os.environ.clear()
        os.environ.update(environment)
        yield
    finally:
        sys.executable = before
        os.environ.clear()
        os.environ.update(variables)


def deepspeeds_command(arguments: list[str], environment: dict[str, str]) -> list[str]:
    """Returns the command and folder that DeepSpeed's runner would start for one of this project's commands."""
    from deepspeed.launcher import runner

    caught: list[list[str]] = []

    class Started:
        returncode = 0

        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            caught.append(command)

        def wait(self) -> None:
            return

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.subprocess, "Popen", Started)
        patch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        patch.setattr(runner.signal, "signal", lambda *arguments: None)
        patch.setattr(runner, "DEEPSPEED_ENVIRONMENT_NAME", environment["DS_ENV_FILE"])
        patch.setattr(os, "environ", dict(environment))
        patch.chdir(launcher_command.LAUNCHER_FOLDER)
        runner.main(arguments)
    return caught[0]


def check_values(shells: Shells, hostfile: Path, launcher: Launcher, folder: str, python: str, env: Any) -> bool:
    """Passes values through a launcher to shells; returns whether the run would start."""
    hosts = parse_hostfile(hostfile.read_text(), hostfile)
    values = {"PATH": "/usr/bin:/bin", **{name: value.replace("\0", "") for name, value in env}}
    executable = shells.interpreter(python)
    guard = guard_arguments("10.0.0.1", 1234, Path(folder) / "token", 15.0)
    with python_at(executable, values):
        environment = launcher_environment(launcher, values)
        refusal = ""
        try:
            check_launcher(launcher, hosts, environment, lambda name: name)
            commands = build_commands(launcher, hosts, guard)
        except ConfigError as error:
            refusal = str(error)
        if refusal:
            assert "shells would change the character" in refusal and refusal.isprintable()
            return False
        if launcher == "ssh":
            lines = [line for command in commands for line in shells.run("ssh", command[1:], environment)]
        else:
            ((_, _, _, *arguments),) = commands
            program, *words = deepspeeds_command(arguments, environment)
            assert program == {"pdsh": "pdsh", "slurm": "srun"}.get(launcher, "mpirun")
            lines = shells.run(program, words, environment)
    shells.check_untouched()
    assert len(lines) == len(HOSTS)
    for line in lines:
        assert line[-len(guard) :] == guard, (line, guard)  # the words arrive as they were
        assert Path(os.fsdecode(bytes.fromhex(line[-2].removeprefix("--token=")))) == Path(folder) / "token"
    return True


def check_generated(shells: Shells, hostfile: Path, count: int) -> None:
    started = {True: 0, False: 0}

    @settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(
        launcher=st.sampled_from(LAUNCHERS),
        folder=texts,
        python=st.one_of(st.just("plain"), st.just("plain"), texts),
        env=st.lists(st.tuples(names, texts), max_size=2),
    )
    def check(launcher: Launcher, folder: str, python: str, env: Any) -> None:
        started[check_values(shells, hostfile, launcher, folder, python, env)] += 1

    check()
    assert started[True] > count / 4 and started[False] > count / 20, started


@pytest.fixture(scope="module")
def plain_hostfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_hostfile(tmp_path_factory.mktemp("plain") / "hostfile", HOSTS).path


def test_no_value_is_read_by_a_shell(shells: Shells, plain_hostfile: Path) -> None:
    check_generated(shells, plain_hostfile, 100)


@pytest.mark.slow
def test_no_value_of_thousands_is_read_by_a_shell(shells: Shells, plain_hostfile: Path) -> None:
    check_generated(shells, plain_hostfile, 4000)


def test_the_stand_ins_do_harm(shells: Shells) -> None:
    """Checks that the replaced programs run injected code, so the tests above can fail."""
    environment = {"PATH": os.environ["PATH"]}
    harm = 0
    for value in NASTY[:11]:
        shells.run("pdsh", ["-w", "node0", f"{shells.python}", value], environment)
        harm += (shells.folder / MARK).exists()
        (shells.folder / MARK).unlink(missing_ok=True)
    assert harm >= 7
    shells.run("srun", ["-n", "1", str(shells.python), "-u", f"$(touch {MARK})"], environment)
    (shells.folder / MARK).unlink()


@pytest.mark.parametrize(
    "launcher", ["pdsh", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ssh", "openmpi", "slurm"))]
)
def test_a_run_with_strange_folders_trains(tmp_path: Path, launcher: str) -> None:
    """Launches DeepSpeed's launcher from folders, and with output folders, whose names are shell code."""
    stand_ins.install(tmp_path / "bin")
    folder = tmp_path / f"a 'b\" $(touch {MARK})`touch {MARK}`;touch {MARK}\n%n é"
    folder.mkdir()
    mapping = small_run_mapping(0, samples=(12, 12, 12))
    mapping["beit3_ds"]["training"] |= {"output_dir": "out $(touch planted) `id`", "total_steps": 3, "warmup_steps": 1}
    config = folder / "-c $(touch planted).json"
    config.write_text(json.dumps(mapping))
    hostfile = write_hostfile(folder / "hosts $(id)", HOSTS)
    secrets = {"HF_TOKEN": "x1", "MLFLOW_TRACKING_PASSWORD": "x2", "NCCL_DEBUG": f"$(touch {MARK})"}
    environment = {**os.environ, **secrets, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[3])
    command = [sys.executable, "-m", "tests.cluster.launch.stand_in_launch", hostfile.path, config.name]
    options = [
        f"--launcher={launcher}",
        "--env=ASKED_TOKEN=x",
        "--env",
        f"GREETING=$(touch {MARK}) `id`",
        "--keepalive=30",
    ]
    done = subprocess.run(
        [*command, *options], cwd=folder, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert f"from step 0, $(touch {MARK}) `id`" in done.stdout
    assert "finished: 3 steps" in done.stderr
    assert "from step 0" in done.stdout and "secrets ['ASKED_TOKEN']" in done.stdout
    assert not list(tmp_path.rglob(MARK)) and not (Path("/") / MARK).exists()
    assert {path.name for path in folder.iterdir()} == {config.name, hostfile.path.name, "out $(touch planted) `id`"}
