"""Tests that launcher commands are awaited, and that processes they leave behind are killed."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from beit3_ds.cluster.launch.launcher_process import LauncherProcess

LEAVE_A_CHILD = "import subprocess; subprocess.Popen(['sleep', '1000']); import time; time.sleep(1000)"


def _start(folder: Path, *programs: str) -> LauncherProcess:
    commands = [[sys.executable, "-c", program] for program in programs]
    return LauncherProcess(commands, dict(os.environ), folder, folder / "launcher.log")


def test_statuses_are_known_once_all_commands_have_ended(tmp_path: Path) -> None:
    launcher = _start(tmp_path, "print('one')", "raise SystemExit(3)")
    assert asyncio.run(launcher.end(60)) == []
    assert launcher.statuses() == [0, 3] and "one" in (tmp_path / "launcher.log").read_text()


def test_what_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    launcher = _start(tmp_path, LEAVE_A_CHILD)

    async def end() -> list[int]:
        (pid,) = (process.pid for process in launcher._processes)
        while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
            await asyncio.sleep(0.01)
        assert launcher.statuses() is None
        killed = await launcher.end(0)
        assert killed == [int(children[0]), pid]  # children first
        return killed

    assert len(asyncio.run(end())) == 2 and launcher.statuses() == [-9]


def test_output_that_the_disk_refuses_ends_no_command(tmp_path: Path) -> None:
    """Catches DeepSpeed's launcher, which ends the run if the disk with its log is full."""
    launcher = _start(tmp_path, "print('x' * (1 << 20), flush=True)")
    full = LauncherProcess([[sys.executable, "-c", "print('x', flush=True)"]], {}, tmp_path, Path("/dev/full"))
    assert asyncio.run(full.end(60)) == asyncio.run(launcher.end(60)) == []
    assert full.statuses() == launcher.statuses() == [0]
    assert (tmp_path / "launcher.log").read_text() == "x" * (1 << 20) + "\n"


def test_a_command_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="none"):
        LauncherProcess([["/none"]], {}, tmp_path, tmp_path / "launcher.log")
