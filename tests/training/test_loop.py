"""Tests that a run resumes from its newest checkpoint."""

from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.index import read_index
from tests.test_train import finish, write


def test_total_steps_below_the_checkpoint_are_refused(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    training = run_mapping["beit3_ds"]["training"]
    training |= {"total_steps": 2, "eval_interval": 100, "save_interval": 100}
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output

    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output
    # catches a run that trains nothing and does not report why
    assert "nothing is left to train: the checkpoint holds all training.total_steps=2 steps" in output

    training["total_steps"] = 1
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 2, output
    # catches status 0 without a step or a message
    assert "training.total_steps=1 is less than 2, the step of checkpoint" in output
    assert "Traceback" not in output


def test_a_resumed_run_continues_at_its_position_in_the_data(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    own = run_mapping["beit3_ds"]
    own["training"] |= {"total_steps": 2, "eval_interval": 100, "save_interval": 100}
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output
    positions = read_index(tmp_path / "run" / "checkpoints" / "step-00000002").data["positions"]
    assert {name: position["sets"][0]["taken"] for name, position in positions.items()} == dict.fromkeys(positions, 4)

    own["data"]["images"]["samples_per_step"] = 3
    own["training"]["total_steps"] = 4
    status, output = finish(write(run_mapping, tmp_path))
    assert status == 0, output
    assert "\ndata.images: samples_per_step 2 -> 3: every source continues there\n" in output
    positions = read_index(tmp_path / "run" / "checkpoints" / "step-00000004").data["positions"]
    # catches a position computed from the step and the current samples per step, which would be 12
    assert positions["images"]["sets"][0]["taken"] == 4 + 2 * 3
    assert positions["texts"]["sets"][0]["taken"] == 8
