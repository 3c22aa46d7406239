"""Tests complete runs, restarts, and refusals before any process starts."""

import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.launch.running_launch import STEPS, Launch


def test_a_run_to_its_end(launch: Callable[..., Launch]) -> None:
    """Checks a complete run: logs of all ranks, output of rank 0, forwarded variables, and no worker left behind."""
    run = launch([], environment=['GREETING=it\'s a "day"\n'])
    assert run.wait() == 0
    assert f"finished: {STEPS} steps" in run.printed()
    assert f"\nstep {STEPS}\n" in run.printed()
    for rank in range(3):
        assert re.match(rf"rank {rank} of 3, worker \d+, from step 0, it's a \"day\"\n\n", run.log(rank))
    assert "rank 1 of 3" not in run.printed()
    assert not list(run.output_dir.glob("logs/*/token"))


def test_restarts_go_on_from_the_newest_checkpoint(launch: Callable[..., Launch]) -> None:
    """Checks that no step is repeated after two faults and two restarts.

    Steps are read from the logs, because output of rank 0 after a reported failure is not printed.
    """
    run = launch([[1, 5, "SIGKILL"], [0, 10, 3]], restarts=2)
    assert run.wait() == 0
    assert "restart 1 of 2: 3 ranks on localhost (3), from the checkpoint of step 5\n" in run.printed()
    assert "restart 2 of 2: 3 ranks on localhost (3), from the checkpoint of step 10\n" in run.printed()
    assert [run.log(2, attempt).split(", ")[2] for attempt in (1, 2, 3)] == [
        "from step 0",
        "from step 5",
        "from step 10",
    ]
    logs = "".join(run.log(0, attempt) for attempt in (1, 2, 3))
    steps = list(map(int, re.findall(r"^step (\d+)$", logs, re.MULTILINE)))
    assert steps == list(range(1, STEPS + 1))


def test_a_finished_run_is_repeated(launch: Callable[..., Launch]) -> None:
    """Checks restarts while a finished run is repeated with --force.

    A restart starts from the beginning while the old checkpoints are still in place, and otherwise resumes.
    """
    assert launch([], hosts="a slots=2\n").wait() == 0
    faults = [[1, -1, 3], [1, 5, 3]]
    run = launch(faults, hosts="a slots=2\n", restarts=2, force=True)
    assert run.wait() == 0
    assert (run.output_dir / "checkpoints-1" / "latest").read_text() == f"step-{STEPS:08d}\n"
    assert "restart 1 of 2: 2 ranks on a (2), from the beginning, because there is no checkpoint\n" in run.printed()
    assert "restart 2 of 2: 2 ranks on a (2), from the checkpoint of step 5\n" in run.printed()
    assert [run.log(1, attempt).split(", ")[2] for attempt in (2, 3, 4)] == [
        "from step 0",
        "from step 0",
        "from step 5",
    ]
    assert f"finished: {STEPS} steps" in run.printed()


@pytest.mark.slow
def test_restarts_are_counted(launch: Callable[..., Launch]) -> None:
    run = launch([[1, 5, 3], [1, 6, 3], [1, 7, 3]], restarts=1)
    assert run.wait() == 1
    assert "the run has failed (restarted 1 time); the same command resumes from the checkpoint of step 6" in (
        run.printed()
    )


def test_a_restart_without_a_host_has_fewer_ranks(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """Checks that a restart without one host uses all five remaining slots, though 5 does not divide the samples."""
    run = launch([[3, 5, "SIGKILL"]], "a slots=1\nb slots=3\nc slots=2\n", restarts=1)
    run.wait_until(lambda: "FAILED" in run.printed())
    (tmp_path / "unreachable").write_text("a")
    assert run.wait() == 0
    expected = "without a (not reachable): 5 ranks instead of 6 on b (3), c (2), from the checkpoint of step 5\n"
    assert f"restart 1 of 1 {expected}" in run.printed()
    assert run.log(3, 2).startswith("rank 3 of 5, ")
    assert (run.output_dir / "logs" / "attempt_2" / "hostfile").read_text() == "b slots=3\nc slots=2\n"


def test_no_restart_below_the_smallest_number_of_ranks(launch: Callable[..., Launch], tmp_path: Path) -> None:
    run = launch([[0, 5, "SIGKILL"]], "a slots=3\nb slots=1\n", restarts=1, min_ranks=4)
    run.wait_until(lambda: "FAILED" in run.printed())
    (tmp_path / "unreachable").write_text("b")
    assert run.wait() == 1
    assert "no restart without b (not reachable): the layout of" in run.printed()
    assert "fits no number of ranks between 4 (--min-ranks) and 3" in run.printed()


def test_what_cannot_work_is_said_before_anything_starts(launch: Callable[..., Launch], tmp_path: Path) -> None:
    (tmp_path / "unreachable").write_text("b")
    run = launch([], "a slots=3\nb slots=1\n")
    assert run.wait() == 2
    assert re.search(r"hosts: host b cannot be reached: no route to host\. Fix it or remove it", run.printed())
    run = launch([], "a slots=999\n")
    assert run.wait() == 2
    assert "999 ranks" in run.printed()  # more than the samples of a step
    assert not list(run.output_dir.glob("logs/attempt_*"))


def test_a_second_launch_with_the_same_log_folder_is_refused(launch: Callable[..., Launch], tmp_path: Path) -> None:
    """Catches launches that mix their attempts and log lines, or use the same folder `attempt_1`."""
    copy = tmp_path / "run" / "logs" / "attempt_2.bak"
    copy.mkdir(parents=True)
    (copy / "rank_0.log").write_text("mine")
    first = launch([], steps=200)
    first.wait_until(lambda: "\nstep 1\n" in first.printed())
    folder = tmp_path / "second"
    folder.mkdir()
    second = Launch(folder, "localhost slots=3\n", [], log_dir=str(first.output_dir / "logs"))
    assert second.process.wait(60) == 2
    assert f"is in use by process {first.process.pid} on host " in second.printed()
    assert "name another log folder with --log-dir" in second.printed()
    first.process.terminate()
    assert first.wait() == 128 + signal.SIGTERM
    names = {path.name for path in (first.output_dir / "logs").iterdir()}
    assert names == {"attempt_1", "attempt_2.bak", "launch.log"}
    assert (copy / "rank_0.log").read_text() == "mine"
    assert launch([]).wait() == 0  # at once
    assert (first.output_dir / "logs" / "attempt_2").is_dir()
