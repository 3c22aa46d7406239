"""Tests how the losses of two runs are compared."""

from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.training.comparison import compare_runs, plot_comparison
from beit3_ds.training.metrics_log import MetricsLog


def write_run(folder: Path, losses: dict[int, float]) -> Path:
    metrics_log = MetricsLog(folder / "metrics.jsonl")
    metrics_log.append({"step": 0, "kind": "validation", "image_mim": 9.0})
    for step, loss in losses.items():
        metrics_log.append({"step": step, "kind": "train", "loss": loss, "image_mim": loss / 2})
    return folder


def test_largest_difference_is_at_its_step(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {1: 5.0, 2: 4.0, 3: 3.0})
    second = write_run(tmp_path / "b", {2: 4.5, 3: 2.9, 4: 1.0})
    comparison = compare_runs(first, second)
    assert comparison.steps == (2, 3)
    assert comparison.largest_difference("loss") == (pytest.approx(0.5), 2)
    assert comparison.largest_difference("image_mim") == (pytest.approx(0.25), 2)
    assert "at step 2" in comparison.describe()
    plot_comparison(comparison, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_runs_without_a_common_step_are_an_error(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", {1: 5.0})
    with pytest.raises(ConfigError, match="no step in common"):
        compare_runs(first, write_run(tmp_path / "b", {2: 5.0}))
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        compare_runs(first, tmp_path)
