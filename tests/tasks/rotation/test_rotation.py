"""Tests that a task defined in a single folder is launched, trained, resumed and evaluated in every layout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.training.metrics_log import MetricsLog
from tests.built_once import build_once
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping

TWO_DATA_RANKS = (2, 3, {})
LAYOUTS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "ZeRO-3 on 2 ranks": TWO_DATA_RANKS,
    "tensor 2": (2, 1, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2": (2, 1, {"pipeline_parallel_size": 2}),
}
FIGURES = ("turn", "accuracy", "loss", "grad_norm")


def write_config(folder: Path, zero_stage: int = 0, parallel: dict[str, Any] | None = None, steps: int = 4) -> Path:
    mapping = small_run_mapping(zero_stage, samples=(8, 0, 0), accumulation=2, image_size=32, drop_path_rate=0.2)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "tests.tasks.rotation"}
    own["parallel"] = {**(parallel or {}), "timeout_seconds": 300}
    own["data"] = {"images": {**own["data"]["images"], "samples_per_step": 8}}
    own["tokenizers"] = {}
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": steps, "warmup_steps": 1}
    own["training"] |= {"log_interval": 1, "eval_interval": 2, "eval_samples": 10, "save_interval": 2}
    own["training"] |= {"learning_rate": 3e-3}
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def train(config: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main([config])


def figures(folder: Path) -> list[dict[str, float]]:
    records = MetricsLog(folder / "run" / "metrics.jsonl").records()
    kept = [record for record in records if record["kind"] in ("train", "validation")]
    return [{name: record[name] for name in FIGURES if name in record} for record in kept]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def build(folder: Path) -> None:
        assert run_ranks(train, 1, str(write_config(folder))) == [0]

    return build_once(tmp_path_factory, "rotation", build)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same(layout: str, one_process: Path, tmp_path: Path) -> None:
    num_ranks, zero_stage, parallel = LAYOUTS[layout]
    config = write_config(tmp_path / "run", zero_stage, parallel)
    assert run_ranks(train, num_ranks, str(config)) == [0] * num_ranks
    found, expected = figures(tmp_path / "run"), figures(one_process)
    assert len(found) == len(expected) == 7  # four steps; evaluations before, between and at the end
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
    assert 0 < expected[0]["accuracy"] <= 1 and {"turn", "accuracy"} == set(expected[0])


def test_resumes_bit_for_bit(one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    config = write_config(folder)
    shutil.copytree(one_process / "run", folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    assert run_ranks(train, 1, str(config)) == [0]
    assert figures(folder) == figures(one_process)


def test_summary_has_its_terms(one_process: Path) -> None:
    summary = json.loads((one_process / "run" / "summary.json").read_text())
    assert set(summary["validation"]) == {"turn", "accuracy"}
    assert (one_process / "run" / "losses.png").stat().st_size > 1000


@pytest.mark.slow
def test_it_is_launched(one_process: Path, tmp_path: Path) -> None:
    config, hostfile = write_config(tmp_path / "run", *TWO_DATA_RANKS[1:]), tmp_path / "hosts"
    hostfile.write_text("localhost slots=2\n")
    command = [sys.executable, "-m", "beit3_ds.cli.main", "launch", str(hostfile), str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for ours, theirs in zip(figures(tmp_path / "run"), figures(one_process), strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5)
