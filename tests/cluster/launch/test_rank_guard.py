"""Tests that guards end their rank when the supervisor is gone, and report why they cannot work."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.launch.running_launch import Launch


def test_ranks_end_when_their_supervisor_is_gone(launch: Callable[..., Launch]) -> None:
    """Checks that ranks without a supervisor save and end; a rank that does not stop is killed after a time limit."""
    run = launch([[1, 5, "ignore"]], steps=10000)
    run.wait_until(lambda: "step 7\n" in run.printed())
    run.process.kill()
    run.wait()
    assert "rank 0 stops on ['SIGTERM']" in run.log(0)
    assert "rank 1 stops" not in run.log(1)


@pytest.mark.slow
def test_ranks_end_when_their_supervisor_is_silent(launch: Callable[..., Launch]) -> None:
    run = launch([], steps=10000)
    run.wait_until(lambda: "step 5\n" in run.printed())
    run.process.send_signal(signal.SIGSTOP)
    run.wait_until(lambda: not any("fake_trainer" in line for line in run.descendants().values()))


def test_a_guard_says_why_it_cannot_work(tmp_path: Path) -> None:
    def guard(token: Path) -> str:
        arguments = ["--address=127.0.0.1", "--port=9", f"--token={os.fsencode(token).hex()}", "--keepalive=5"]
        command = [sys.executable, "-m", "beit3_ds.cluster.launch.rank_guard", *arguments]
        done = subprocess.run(command, env={**os.environ, "RANK": "3"}, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        return done.stderr

    assert "The log folder must be on storage that all hosts share: name one with --log-dir" in guard(tmp_path / "no")
    (tmp_path / "token").write_text("a")
    said = guard(tmp_path / "token")
    assert re.match(r"beit3 launch: rank 3 on host \S+ cannot reach the supervisor at 127.0.0.1 port 9: ", said)
