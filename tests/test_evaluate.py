"""Tests that `beit3 evaluate` refuses what it cannot score, and averages loss terms if a task has no metrics."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from beit3_ds.config import ModelConfig, build_run_config
from beit3_ds.model.pretrained import weights_metadata
from beit3_ds.tasks import build_task
from tests.ranks import run_ranks
from tests.tasks.fine_tuning import evaluate, write_json


def write_weights(mapping: dict[str, Any], path: Path, task: dict[str, Any] | None) -> str:
    """Exports initial weights of a run's model; returns their path."""
    from beit3_ds.model import initialize_parameters

    config = build_run_config(mapping)
    model = build_task(config).build_model()
    initialize_parameters(model, config.model, seed=1)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    save_file(tensors, path, weights_metadata(config.model, 3, task))
    return str(path)


@pytest.fixture
def config(run_mapping: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], str]:
    return run_mapping, str(write_json(tmp_path, run_mapping))


def test_pretraining_has_mean_terms(config: tuple[dict[str, Any], str], tmp_path: Path) -> None:
    weights = write_weights(config[0], tmp_path / "w.safetensors", {"name": "pretraining"})
    arguments = [config[1], "--weights", weights, "--out", str(tmp_path / "out")]
    assert run_ranks(evaluate, 1, arguments) == [0]
    content = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert content["step"] == 3 and content["split"] == "validation"
    assert {"image_mim", "text_mlm", "pair_mim", "pair_mlm"} == set(content["metrics"])


@pytest.mark.parametrize(
    ("split", "task", "message"),
    [
        ("validation", {"name": "vqa", "num_answers": 3}, "weights of the task vqa"),
        ("test", {"name": "pretraining"}, "no stream has sources in 'test'"),
    ],
)
def test_refusals(
    split: str,
    task: dict[str, Any],
    message: str,
    config: tuple[dict[str, Any], str],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    weights = write_weights(config[0], tmp_path / "w.safetensors", task)
    assert evaluate([config[1], "--weights", weights, "--split", split]) == 2
    assert message in capfd.readouterr().err


def test_weights_without_heads_are_refused(
    config: tuple[dict[str, Any], str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    path = tmp_path / "w.safetensors"
    weights = write_weights(config[0], path, {"name": "pretraining"})
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("heads.")}
    model: ModelConfig = build_run_config(config[0]).model
    save_file(tensors, path, weights_metadata(dataclasses.replace(model), 3, {"name": "pretraining"}))
    assert evaluate([config[1], "--weights", weights]) == 2
    assert "holds no head of the task pretraining" in capfd.readouterr().err


def inspect_evaluation(path: str, weights: str) -> tuple[int, str]:
    """Builds the model of an evaluation; returns the number of tensors in AdamW's state, and the kernel backend."""
    import argparse

    from beit3_ds.checkpoint.flat_tensors import adamw_of
    from beit3_ds.config import load_run_config
    from beit3_ds.evaluate import add_options, build_evaluator, open_inputs
    from beit3_ds.kernels.ops.measured_op import CHOICES
    from beit3_ds.runtime.process_group import joined_ranks
    from beit3_ds.runtime.stop_signals import StopSignals

    parser = argparse.ArgumentParser()
    add_options(parser)
    config = load_run_config(path)
    inputs = open_inputs(config, parser.parse_args(["--weights", weights]))
    with joined_ranks(config.parallel, str(inputs.folder)) as mesh:
        evaluator = build_evaluator(config, inputs, mesh, StopSignals(), "validation")
        return sum(map(len, adamw_of(evaluator.schedule.engine.optimizer).state.values())), CHOICES.backend


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_it_allocates_no_moments_and_takes_the_configured_kernels(
    zero_stage: int, run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    run_mapping["zero_optimization"] = {"stage": zero_stage}
    run_mapping["beit3_ds"]["training"]["kernel_backend"] = "library"
    weights = write_weights(run_mapping, tmp_path / "w.safetensors", {"name": "pretraining"})
    path = str(write_json(tmp_path, run_mapping))
    assert run_ranks(inspect_evaluation, 1, path, weights) == [(0, "library")]
