"""Tests how a run reports skipped steps, and that too many end the run."""

import contextlib
import dataclasses
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.batch import StepBatch
from beit3_ds.checkpoint.folder import CheckpointFolder
from tests.ranks import run_ranks

FAULTY_RANK = 1
FAULTY_STEPS = [1, 2, 4, 6, 7, 8, 9, 10, 11]


def train_with_faults(config: str, faulty_steps: list[int]) -> tuple[int, str, list[tuple[str, ...]]]:
    """Trains on one rank; returns status, output, and the names of the images that it replaced by NaN."""
    from beit3_ds.train import main
    from beit3_ds.training import loop

    update, names = loop._update, []

    def update_with_faults(run: Any, step_batch: StepBatch, *arguments: Any) -> Any:
        if step_batch.step in faulty_steps and torch.distributed.get_rank() == FAULTY_RANK:
            *others, last = step_batch.micro_batches
            assert last.pixels is not None
            names.append(last.sample_names)
            last = dataclasses.replace(last, pixels=torch.full(last.pixels.shape, math.nan))
            step_batch = dataclasses.replace(step_batch, micro_batches=(*others, last))
        return update(run, step_batch, *arguments)

    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        patch.setattr(loop, "_update", update_with_faults)
        status = main([config])
    return status, output.getvalue(), names


@pytest.fixture
def config(run_mapping: dict[str, Any], tmp_path: Path) -> str:
    """Returns the configuration of a run of 14 steps that ends after three consecutive skipped steps."""
    run_mapping["gradient_accumulation_steps"] = 2
    for stream in ("images", "pairs", "texts"):
        run_mapping["beit3_ds"]["data"][stream]["samples_per_step"] = 4
    run_mapping["beit3_ds"]["training"] |= {"total_steps": 14, "save_interval": 5, "eval_interval": 100}
    run_mapping["beit3_ds"]["training"] |= {"max_skipped_steps": 3, "log_interval": 2}
    (tmp_path / "config.json").write_text(json.dumps(run_mapping))
    return str(tmp_path / "config.json")


def test_skipped_steps_are_named_and_too_many_end_the_run(config: str, tmp_path: Path) -> None:
    """Catches a count that a good step does not reset, and a lost checkpoint."""
    checkpoints = tmp_path / "run" / "checkpoints"
    (status, output, _), (other_status, other_output, names) = run_ranks(train_with_faults, 2, config, FAULTY_STEPS)
    assert (status, other_status) == (2, 2), output
    (setup,) = (line for line in output.splitlines() if line.startswith("beit3_ds "))
    for words in ("1 host x 2 ranks (", "ZeRO-3, fp32", "12 samples per step in 2", "steps 1 to 14, seed 1"):
        assert words in setup, setup
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    skipped = [record for record in records if record["kind"] == "skipped_step"]
    assert [(record["step"], record["in_a_row"]) for record in skipped] == [
        (2, 1),
        (3, 2),
        (5, 1),
        (7, 1),
        (8, 2),
        (9, 3),
    ]
    for record, expected in zip(skipped, names, strict=True):
        (rank,) = record["ranks"]
        assert rank["rank"] == 1
        assert rank["name"].startswith("rank 1 (stage 0, data-parallel rank 1, tensor-parallel rank 0, host ")
        assert rank["micro_batches"] == [{"micro_batch": 1, "samples": list(expected)}]
    (line,) = re.findall(
        r"WARNING: step 2 is skipped on all ranks, 1 in a row .*\n(  not finite on rank 1 .*)\n", output
    )
    assert "micro-batch 1, of the samples " in line and names[0][0] in line
    assert [record.get("skipped_steps") for record in records if record["kind"] == "train"] == [1, 2, 3]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert all(map(math.isfinite, losses)), "a skipped step's loss is in the mean"
    for text in (output, other_output):
        assert "steps 7 to 9 were skipped because losses or gradients were not finite" in text
        assert f"newest checkpoint, {checkpoints / 'step-00000009'}," in text
    with contextlib.closing(CheckpointFolder(checkpoints / "step-00000009")) as newest:
        assert newest.index.optimizer_step == 3 and newest.find_damage(newest.index.files) is None


@pytest.mark.slow
def test_restarts_push_out_no_older_checkpoint(config: str, tmp_path: Path) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    run_ranks(train_with_faults, 2, config, FAULTY_STEPS)
    ((status, output, _), _) = run_ranks(train_with_faults, 2, config, FAULTY_STEPS)
    assert status == 2 and "resuming after step 9" in output and "steps 10 to 12 were skipped" in output
    assert f"newest checkpoint, {checkpoints / 'step-00000010'}," in output, "saved at its interval only"
    assert not (checkpoints / "step-00000012").exists()

    ((status, output, _), _) = run_ranks(train_with_faults, 2, config, [])
    assert status == 0 and "resuming after step 10" in output, output
