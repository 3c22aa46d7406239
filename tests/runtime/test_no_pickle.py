"""Tests that ranks train, save and resume while nothing from another rank can be unpickled."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.ranks import run_ranks
from tests.test_train import losses

STEPS = 24


class RunWithoutPickle(TrainingRun):
    """Runs ranks in which unpickling raises."""

    module = "tests.runtime.rank_without_pickle"


def gather_objects() -> list[str]:
    """Exchanges an object as torch does, with and without permission to unpickle; returns the errors."""
    import torch.distributed as dist

    from beit3_ds.config import ParallelConfig
    from beit3_ds.runtime.process_group import joined_ranks
    from tests.runtime.rank_without_pickle import forbid_unpickling

    said = []
    with joined_ranks(ParallelConfig(timeout_seconds=60)):
        found: list[Any] = [None, None]
        dist.all_gather_object(found, {"rank": 1})
        forbid_unpickling()
        try:
            dist.all_gather_object(found, {"rank": 1})
        except AssertionError as error:
            said.append(str(error))
    return said


def test_unpickling_is_noticed() -> None:
    """Checks that unpickling between ranks is detected, so that the tests below can fail."""
    assert run_ranks(gather_objects, 2) == [["pickle.Unpickler was called between ranks"]] * 2


@pytest.mark.parametrize(
    "layout",
    [
        {},
        pytest.param({"tensor_parallel_size": 2}, marks=pytest.mark.slow),
        pytest.param({"pipeline_parallel_size": 2}, marks=pytest.mark.slow),
    ],
    ids=["data", "tensor", "pipeline"],
)
def test_ranks_train_save_and_resume_without_pickle(
    layout: dict[str, int], run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    """Catches an object sent as a pickle; losses and states must equal those of ordinary ranks."""
    if "pipeline_parallel_size" in layout:
        run_mapping |= {"zero_optimization": {"stage": 1}, "gradient_accumulation_steps": 2}
    run_mapping["beit3_ds"]["parallel"] = layout
    settings = {"total_steps": STEPS, "save_interval": 8, "eval_interval": STEPS, "keep_checkpoints": 9}
    undisturbed = TrainingRun(run_mapping, tmp_path / "undisturbed", 2, **settings)
    assert undisturbed.finish() == [0, 0], undisturbed.output()
    run = RunWithoutPickle(run_mapping, tmp_path / "run without pickle", 2, **settings)
    with run.started():
        run.wait_until(lambda: f"step 2/{STEPS}" in run.output())
        os.kill(run.ranks[1].pid, signal.SIGTERM)
        assert run.wait() == [0, 0], run.output() + run.output(1)
    assert "stopped after step" in run.output()
    assert run.finish() == [0, 0], run.output() + run.output(1)
    assert "resuming after step" in run.output()
    assert losses(run.output_dir) == losses(undisturbed.output_dir)
    check_same_state(run.checkpoint(STEPS), undisturbed.checkpoint(STEPS))
