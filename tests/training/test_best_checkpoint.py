"""Tests how evaluations are compared, that the best checkpoint is kept, and when a run ends early."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.checkpoint.index import BEST
from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.tasks import build_task
from beit3_ds.training.best_checkpoint import BestCheckpoint, is_higher_better
from tests.ranks import run_ranks
from tests.run_config import small_run_config
from tests.tasks.rotation.test_rotation import train, write_config


def best_of(values: list[float], *, higher: bool = True, patience: int | None = None, **data: Any) -> BestCheckpoint:
    training = dataclasses.replace(
        small_run_config(0).training, best_metric="accuracy", early_stop_evaluations=patience
    )
    best = BestCheckpoint(training, is_higher_better=higher, data=data)
    for step, value in enumerate(values):
        best.add(step, {"accuracy": value})
    return best


def test_the_best_value_is_kept() -> None:
    best = best_of([0.1, 0.5, 0.5, 0.2])
    assert (best.step, best.value) == (1, 0.5)  # an equal value later is no improvement
    assert best_of([0.1, 0.5, 0.2], higher=False).step == 0
    assert best_of([math.nan, 0.1, math.nan]).step == 1
    assert best.describe() == "accuracy 0.5000 after step 1"


def test_a_run_stops_after_evaluations_without_improvement() -> None:
    assert not best_of([0.5, 0.1], patience=2).is_exhausted and best_of([0.5, 0.1], patience=2).may_be_exhausted_next
    assert best_of([0.5, 0.1, 0.5], patience=2).is_exhausted
    assert not best_of([0.5, 0.1, 0.6], patience=2).is_exhausted
    assert not best_of([0.5] * 9).is_exhausted


def test_a_restart_continues_the_comparison() -> None:
    state = best_of([0.5, 0.1], patience=2).state()
    assert json.loads(json.dumps(state)) == state
    resumed = best_of([], patience=2, **state)
    assert (resumed.step, resumed.value, resumed.may_be_exhausted_next) == (0, 0.5, True)
    assert not resumed.add(7, {"accuracy": 0.4}) and resumed.is_exhausted
    state[BEST]["metric"] = "recall"
    assert best_of([], **state).step is None and best_of([]).state() == {}


def test_a_metric_that_is_not_evaluated_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"best_metric='accuracy': the evaluation of step 3 has only loss\. Name one"):
        best_of([]).add(3, {"step": 3, "loss": 0.5})


def test_metrics_without_a_direction_are_refused(tmp_path: Path) -> None:
    mapping = json.loads(write_config(tmp_path).read_text())
    training = mapping["beit3_ds"]["training"]
    assert not is_higher_better(build_task(build_run_config(mapping)))
    for metric, higher in {"accuracy": True, "turn": False}.items():
        training["best_metric"] = metric
        assert is_higher_better(build_task(build_run_config(mapping))) == higher
    training["best_metric"] = "images"
    with pytest.raises(ConfigError, match=r"'images' is not a metric .* Name one of: accuracy, turn\."):
        is_higher_better(build_task(build_run_config(mapping)))
    training["best_metric"], mapping["beit3_ds"]["data"]["images"]["validation"] = "accuracy", []
    with pytest.raises(ConfigError, match="needs validation data"):
        is_higher_better(build_task(build_run_config(mapping)))
    training |= {"best_metric": None, "early_stop_evaluations": 2}
    with pytest.raises(ConfigError, match="early_stop_evaluations=2 needs best_metric"):
        build_run_config(mapping)


def test_a_run_ends_early_with_its_best_checkpoint(tmp_path: Path) -> None:
    """Checks the early end with a learning rate near zero, at which only the first evaluation is an improvement."""
    path = write_config(tmp_path, steps=12)
    mapping = json.loads(path.read_text())
    mapping["beit3_ds"]["training"] |= {"learning_rate": 1e-15, "best_metric": "accuracy"}
    mapping["beit3_ds"]["training"] |= {"early_stop_evaluations": 2, "save_interval": 1, "keep_checkpoints": 1}
    path.write_text(json.dumps(mapping))
    assert run_ranks(train, 1, str(path)) == [0]
    checkpoints = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*"))
    assert checkpoints == ["step-00000002", "step-00000006"]  # evaluations after 2, 4 and 6 steps
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        summary["steps"] == 6 and summary["best"].startswith("accuracy ") and summary["best"].endswith("after step 2")
    )
    assert run_ranks(train, 1, str(path)) == [0]  # nothing is left to train
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").glob("step-*")) == checkpoints
