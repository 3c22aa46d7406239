"""Tests how a run ends early, and how it continues after a failed save."""

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.runtime.stop_signals import STOP_SIGNALS
from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.preloaded import start_module
from tests.test_train import losses

NO_EVALUATION = {"eval_interval": 1000}


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_signal_to_one_rank_stops_all_with_a_checkpoint(
    number: signal.Signals, run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    """Catches ranks that stop at different steps, and a lost step."""
    settings = {**NO_EVALUATION, "total_steps": 24, "save_interval": 1000}
    run = TrainingRun(run_mapping, tmp_path / "stopped", 2, **settings)
    with run.started():
        run.wait_until(lambda: "step 2/24" in run.output())
        os.kill(run.ranks[1].pid, number)
        assert run.wait() == [0, 0]
    assert f" on {number.name}; the same command" in run.output()
    done = int(run.output().split("stopped after step ")[1].split()[0])
    assert 2 <= done < 24
    assert run.output().count("stopped after") == 1
    assert "stopped after" not in run.output(1)
    run.checkpoint(done).close()
    assert not (run.output_dir / "summary.json").exists()

    assert run.finish() == [0, 0]
    assert f"resuming after step {done} " in run.output()
    undisturbed = TrainingRun(run_mapping, tmp_path / "undisturbed", 2, **settings)
    assert undisturbed.finish() == [0, 0]
    check_same_state(run.checkpoint(24), undisturbed.checkpoint(24))
    assert losses(run.output_dir) == losses(undisturbed.output_dir)


def test_signal_during_the_start_stops_before_the_first_step(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a rank that dies of a signal before it can handle signals; a launcher may delay such signals."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(run_mapping))
    process = start_module("beit3_ds.train", [config], output=subprocess.PIPE, blocked=STOP_SIGNALS)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "stopped on SIGUSR1 before step 1; the same command resumes" in output
    assert "step 1/" not in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def others(run: TrainingRun) -> list[int]:
    """Returns the ids of living processes that the only rank of a run has started."""
    leader, found = run.ranks[0].pid, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            state, _, group, *_ = path.read_text().rpartition(")")[2].split()
            if int(group) == leader != int(path.parent.name) and state != "Z":
                found.append(int(path.parent.name))
    return found


def test_workers_live_as_long_as_their_rank(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Checks that data workers outlive a stop signal until the last step is done.

    Cluster managers and terminals signal all processes. If a rank is killed, its workers must end too.
    """
    run_mapping["beit3_ds"]["data"]["num_workers"] = 2
    run = TrainingRun(run_mapping, tmp_path / "killed", total_steps=400, save_interval=1000, **NO_EVALUATION)
    with run.started():
        run.wait_until(lambda: "step 2/" in run.output())
        assert len(others(run)) >= 3  # two workers, and the server that they are forked from
        for pid in others(run):
            for number in STOP_SIGNALS:
                os.kill(pid, number)
        run.wait_until(lambda: "step 16/" in run.output())  # more than was prepared by then
        run.ranks[0].kill()
        deadline = time.monotonic() + 30
        while others(run):
            assert time.monotonic() < deadline, f"{others(run)} are left"
            time.sleep(0.1)


def test_failed_saves_are_reported(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Checks that training continues after a failed save, and that a run whose last save fails can be restarted."""
    run = TrainingRun(run_mapping, tmp_path / "failing", total_steps=6, save_interval=2, **NO_EVALUATION)
    assert run.finish(failing_saves=[2, 6]) == [2]
    lines = run.output().splitlines()
    (warning,) = (line for line in lines if line.startswith("WARNING") and "step-00000002" in line)
    assert "was not written: [Errno 28] No space left on device (rank 0" in warning
    assert any(line.startswith("saved") and "step-00000004" in line for line in lines)
    (error,) = (line for line in lines if line.startswith("error on rank 0"))
    assert "the checkpoint of step 6 could not be written: [Errno 28] No space left on device" in error
    assert f"The newest whole one is {run.checkpoints / 'step-00000004'}" in error
    assert "Traceback" not in run.output()
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    failed = {record["step"]: record["failed"] for record in records if record["kind"] == "checkpoint"}
    assert failed == {2: True, 4: False, 6: True}
    run.checkpoint(4).close()


@pytest.mark.parametrize("left", [pytest.param("nothing", marks=pytest.mark.slow), "file"])
def test_lost_folder_is_reported(run_mapping: dict[str, Any], tmp_path: Path, left: str) -> None:
    """Checks that training reaches its end without its folder, and that moved checkpoints stay whole.

    If no folder can be created, the run then fails.
    """
    run = TrainingRun(run_mapping, tmp_path / "lost", total_steps=24, keep_checkpoints=2, **NO_EVALUATION)
    away = run.output_dir / "away"
    with run.started():
        run.wait_until(lambda: run.reported_step() >= 2)
        os.kill(run.ranks[0].pid, signal.SIGSTOP)  # else a save may make the folder before the file is there
        run.checkpoints.rename(away)
        if left == "file":
            run.checkpoints.touch()
        os.kill(run.ranks[0].pid, signal.SIGCONT)
        (status,) = run.wait()
    assert "step 24/24" in run.output()
    kept = [CheckpointFolder(path) for path in sorted(away.glob("step-*"))]
    assert kept and all(checkpoint.find_damage(checkpoint.index.files) is None for checkpoint in kept)
    if left == "nothing":
        assert status == 0
        assert f"WARNING: {run.checkpoints} is gone" in run.output()
        run.checkpoint(24).close()
    else:
        assert status == 2
        assert "WARNING: checkpoint" in run.output() and "Not a directory" in run.output()
        (error,) = (line for line in run.output().splitlines() if line.startswith("error on rank 0"))
        assert "the checkpoint of step 24 could not be written: [Errno 20] Not a directory" in error
