"""Tests tokenizer runs: equal for every division of a step, resumed bit for bit, and saved once."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import KINDS
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.cli.main import main as cli
from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.tasks import build_task
from beit3_ds.tasks.visual_tokenizer.code_usage import CodeUsage
from beit3_ds.tokenizers import load_visual_tokenizer
from beit3_ds.training.metrics_log import MetricsLog
from tests.ranks import run_ranks
from tests.run_config import visual_tokenizer_mapping

STEPS = 6
CUTS = {"ZeRO-3 in 4 micro-batches": (2, 3, 4)}
MORE_CUTS = {"ZeRO-0": (2, 0, 1), "ZeRO-1 in 2 micro-batches": (2, 1, 2), "ZeRO-2 on 3 ranks": (3, 2, 1)}
"""Number of ranks, ZeRO stage and micro-batches per rank, by name."""


def write_config(folder: Path, zero_stage: int = 0, accumulation: int = 1, **training: Any) -> Path:
    mapping = visual_tokenizer_mapping(folder, STEPS)
    mapping["zero_optimization"] = {"stage": zero_stage}
    mapping["gradient_accumulation_steps"] = accumulation
    mapping["beit3_ds"]["training"] |= training
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def train(*arguments: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main(list(arguments))


def figures(folder: Path) -> list[dict[str, float]]:
    records = MetricsLog(folder / "run" / "metrics.jsonl").records()
    names = ("step", "feature_distance", "commitment", "loss", "grad_norm", "codes_used", "code_perplexity")
    kept = [record for record in records if record["kind"] in ("train", "validation")]
    return [{name: record[name] for name in names if name in record} for record in kept]


def read_state(folder: Path, step: int = STEPS) -> dict[str, Tensor]:
    """Returns weights, moments and buffers of a checkpoint."""
    checkpoint = CheckpointFolder(folder / "run" / "checkpoints" / f"step-{step:08d}")
    names = [(kind, name) for kind in KINDS for name in checkpoint.names()]
    state = {
        f"{name} {kind}": checkpoint.read_kind(kind, name, whole_slice(checkpoint.shape(name))) for kind, name in names
    }
    return state | {name: checkpoint.read_buffer(name) for name in checkpoint.index.buffers}


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "one"
    assert run_ranks(train, 1, str(write_config(folder))) == [0]
    return folder


def check_cut(one_process: Path, folder: Path, ranks: int, zero_stage: int, accumulation: int) -> None:
    assert run_ranks(train, ranks, str(write_config(folder, zero_stage, accumulation))) == [0] * ranks
    found, expected = figures(folder), figures(one_process)
    assert len(found) == len(expected) == STEPS + 3  # evaluations before, between and at the end
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)  # catches gradients that are summed or counted twice
    ours, theirs = read_state(folder), read_state(one_process)
    assert theirs["quantize.started"] and theirs["quantize.cluster_size"].sum() > 0 and theirs["center"].any()
    for name, value in theirs.items():  # catches sums of one rank or micro-batch, and a k-means of one rank's vectors
        if not name.startswith(("encoder.blocks", "decoder.blocks")):  # a key's bias has no gradient but rounding
            torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("cut", CUTS)
def test_cuts_train_the_same(cut: str, one_process: Path, tmp_path: Path) -> None:
    check_cut(one_process, tmp_path / "run", *CUTS[cut])


@pytest.mark.slow
@pytest.mark.parametrize("cut", MORE_CUTS)
def test_more_cuts_train_the_same(cut: str, one_process: Path, tmp_path: Path) -> None:
    check_cut(one_process, tmp_path / "run", *MORE_CUTS[cut])


def check_same_end(folder: Path, one_process: Path) -> None:
    ours, theirs = read_state(folder), read_state(one_process)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name
    assert figures(folder) == figures(one_process)
    written, expected = (load_file(path / "visual.safetensors") for path in (folder, one_process))
    assert all(torch.equal(written[name], value) for name, value in expected.items())


@pytest.mark.parametrize("step", [2, 4])  # with and without a codebook
def test_resumes_bit_for_bit(step: int, one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "resumed"
    config = write_config(folder)
    shutil.copytree(one_process / "run", folder / "run")
    for later in range(step + 2, STEPS + 2, 2):
        shutil.rmtree(folder / "run" / "checkpoints" / f"step-{later:08d}")
    assert run_ranks(train, 1, str(config)) == [0]
    check_same_end(folder, one_process)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_resumes_after_a_signal(stop: signal.Signals, one_process: Path, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    config = write_config(folder, save_interval=1)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    command = [sys.executable, "-m", "beit3_ds.cli.main", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    while not (folder / "run" / "checkpoints" / "step-00000003").exists():
        assert process.poll() is None and time.sleep(0.01) is None
    process.send_signal(stop)
    output, _ = process.communicate(timeout=120)
    assert (process.returncode == 0) == (stop == signal.SIGTERM), output
    assert not (folder / "visual.safetensors").exists(), "the run was finished before the signal"
    assert run_ranks(train, 1, str(config)) == [0]
    check_same_end(folder, one_process)


def test_results_are_written(one_process: Path) -> None:
    tokenizer = load_visual_tokenizer(one_process / "visual.safetensors")
    assert tokenizer.quantize.started and "oriented gradients" in tokenizer.teacher_description
    state = read_state(one_process)
    assert torch.equal(tokenizer.quantize.weight, state["quantize.weight"])
    name = "decode_task_layer.2.weight"
    assert torch.equal(tokenizer.state_dict()[name], state[f"{name} weight"])
    summary = json.loads((one_process / "run" / "summary.json").read_text())
    assert summary["visual_tokenizer"] == str(one_process / "visual.safetensors")
    assert "of 16 codes used" in summary["codes"] and (one_process / "visual.png").stat().st_size > 1000
    assert set(summary["validation"]) >= {"feature_distance", "commitment"}


def test_finished_training_is_repeated_only_by_force(
    one_process: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "finished"
    config = write_config(folder)
    shutil.copytree(one_process / "run", folder / "run")
    for name in ("visual.safetensors", "visual.safetensors.recipe.json"):
        shutil.copy(one_process / name, folder / name)
    before = (folder / "visual.safetensors").stat().st_mtime_ns
    assert train(str(config)) == 0
    assert "already trained with this recipe" in capfd.readouterr().out
    assert train(str(config), "--set=training.learning_rate=0.1") == 2
    assert "learning_rate from 0.001 to 0.1" in capfd.readouterr().err
    assert (folder / "visual.safetensors").stat().st_mtime_ns == before
    assert run_ranks(train, 1, str(config), "--force") == [0]
    assert (folder / "visual.safetensors").stat().st_mtime_ns != before
    assert (folder / "run" / "checkpoints-1" / f"step-{STEPS:08d}").is_dir()
    check_same_end(folder, one_process)


def test_checkpoint_of_another_recipe_is_refused(
    one_process: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "changed"
    config = write_config(folder, weight_decay=0.5)
    shutil.copytree(one_process / "run", folder / "run")
    assert run_ranks(train, 1, str(config)) == [2]
    assert "weight_decay 0.0001 there, 0.5 here" in capfd.readouterr().err


def test_checkpoint_is_inspected_and_not_exported(
    one_process: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli(["inspect", str(one_process / "run")]) == 0
    text = capsys.readouterr().out
    assert "codebook_size: 16" in text and "visual tokenizer" in text and "4 buffers" in text
    assert cli(["export", str(one_process / "run"), str(tmp_path / "out.safetensors")]) == 2
    assert "trains no BEiT-3" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_model_parallelism_is_refused(size: str, tmp_path: Path) -> None:
    mapping = visual_tokenizer_mapping(tmp_path)
    mapping["beit3_ds"]["parallel"] = {size: 2}
    mapping["gradient_accumulation_steps"] = 2
    with pytest.raises(ConfigError, match=rf"visual_tokenizer supports neither.*{size}=2"):
        build_task(build_run_config(mapping))


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "section 'model' has no meaning": ("model", {"size": "base"}),
    "also those of pairs, in data.images": ("data.pairs", {"train": ["pairs.tar"], "samples_per_step": 4}),
    "continuous_steps=6 must be below": ("task", {"continuous_steps": 6}),
    "tokenizers.visual.path is missing": ("tokenizers", {"visual": {"image_size": 64}}),
    "training.init_from has no meaning": ("training", {"init_from": "weights.safetensors"}),
    "neither oriented_gradients nor": ("task", {"teacher": "clip"}),
}


@pytest.mark.parametrize("message", WRONG)
def test_sections_without_a_meaning_are_refused(message: str, tmp_path: Path) -> None:
    mapping = visual_tokenizer_mapping(tmp_path, STEPS)
    path, changes = WRONG[message]
    section = mapping["beit3_ds"]
    for key in path.split("."):
        section = section.setdefault(key, {})
    section.update(changes)
    with pytest.raises(ConfigError, match=message):
        build_task(build_run_config(mapping))


def test_other_tasks_need_a_model(tmp_path: Path) -> None:
    mapping = visual_tokenizer_mapping(tmp_path)
    mapping["beit3_ds"]["task"] = {"name": "pretraining"}
    with pytest.raises(ConfigError, match="section 'model' is missing: the task pretraining needs it"):
        build_task(build_run_config(mapping))


def test_unfinished_training_of_version_0_1_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "visual.safetensors.training.pt").touch()
    assert train(str(write_config(tmp_path))) == 2
    assert "unfinished training of version 0.1" in capfd.readouterr().err


def test_low_usage_warns_with_a_remedy() -> None:
    usage = CodeUsage(num_codes=3, codebook_size=16, perplexity=2.0, num_seen=1000)
    assert "Use a smaller codebook_size" in usage.describe_if_low()
