"""Checks that images are classified by class names alike in every layout, and what the task refuses."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.sample_data.write_scenes import class_names, write_scenes
from beit3_ds.tasks import build_task
from beit3_ds.tasks.rank_task import RankShare
from beit3_ds.training.metrics_log import MetricsLog
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping

LAYOUTS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "ZeRO-3 on 2 ranks": (2, 3, 1, {}),
    "ZeRO-1 on 3 ranks": (3, 1, 2, {}),
    "tensor 2": (2, 1, 2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2": (2, 2, 2, {"pipeline_parallel_size": 2}),
}
"""Ranks, ZeRO stage, micro-batches and parallel section per layout."""
NUM_CLASSES = 36
WHOLE = RankShare(data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, str]) -> Path:
    """Writes one training image and less than one validation image per class."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=NUM_CLASSES, num_validation=11, size=32)
    shutil.copy(tokenizer_files["text"], folder / "text.spm")
    return folder


def mapping_of(
    scenes: Path, folder: Path, zero_stage: int = 0, micro_batches: int = 1, parallel: dict[str, Any] | None = None
) -> dict[str, Any]:
    model = {"image_size": 32, "drop_path_rate": 0.2, "inputs": ["images", "texts"], "num_vision_language_layers": 0}
    mapping = small_run_mapping(zero_stage, accumulation=micro_batches, **model)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "imagenet", "num_classes": NUM_CLASSES, "mixup": 0.8, "cutmix": 1.0}
    own["parallel"] = {**(parallel or {}), "timeout_seconds": 300}
    own["data"] = {
        "images": {"train": [str(scenes / "classes" / "train")], "samples_per_step": 10},
        "texts": {"train": [{"path": str(scenes / "classes.txt"), "format": "class_names"}]},
        "text_length": 16,
        "rand_augment_operations": 1,
        "random_erasing": 0.2,
        "num_workers": 0,
    }
    own["data"]["images"]["validation"] = [str(scenes / "classes" / "validation")]
    own["data"]["texts"]["samples_per_step"] = NUM_CLASSES
    own["tokenizers"] = {"text": {"path": str(scenes / "text.spm"), "vocab_size": 300}}
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3}
    own["training"] |= {"log_interval": 1, "eval_interval": 2, "eval_batch_size": 4, "save_interval": 2}
    return mapping


def run(mapping: dict[str, Any], folder: Path, num_ranks: int = 1) -> list[dict[str, float]]:
    """Trains and returns losses, norms and metrics."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(mapping))
    assert run_ranks(train, num_ranks, str(folder / "config.json")) == [0] * num_ranks
    records = MetricsLog(folder / "run" / "metrics.jsonl").records()
    names = ("step", "classes", "accuracy", "top5", "images", "grad_norm")
    return [
        {name: record[name] for name in names if name in record}
        for record in records
        if record["kind"] in ("train", "validation")
    ]


def train(config: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main([config])


@pytest.fixture(scope="module")
def one_process(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder = tmp_path_factory.mktemp("imagenet")
    return folder, run(mapping_of(scenes, folder), folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_the_same(
    layout: str, scenes: Path, one_process: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    ranks, zero_stage, micro_batches, parallel = LAYOUTS[layout]
    found = run(mapping_of(scenes, tmp_path, zero_stage, micro_batches, parallel), tmp_path, ranks)
    expected = one_process[1]
    assert len(found) == len(expected) == 7  # four steps; evaluations before, between and at the end
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5)
    assert found[0].get("images") == 11  # each image once, on every number of ranks


def test_resumes_bit_for_bit(scenes: Path, one_process: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    shutil.copytree(one_process[0] / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    assert run(mapping_of(scenes, tmp_path), tmp_path) == one_process[1]


def test_answers_are_written(one_process: tuple[Path, list[dict[str, float]]]) -> None:
    folder = one_process[0] / "run" / "validation"
    lines = [json.loads(line) for line in (folder / "classes.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) == 11 and all(len(set(line["best"])) == 5 for line in lines)
    right = sum(line["best"][0] == line["class"] for line in lines) / 11
    assert right == one_process[1][-1]["accuracy"] and all(line["class"] in line["image"] for line in lines)
    page = (folder / "classes.html").read_text()
    assert page.count("<img src='data:image/jpeg;base64") == 11 and "red circle" in page


def test_some_classes_per_step(scenes: Path, tmp_path: Path) -> None:
    """The classes of the step's images are compared beside those that are drawn, alike on two ranks."""
    mappings = [mapping_of(scenes, tmp_path / str(i), *layout) for i, layout in enumerate([(0, 1), (2, 2)])]
    for mapping in mappings:
        mapping["beit3_ds"]["data"]["texts"]["samples_per_step"] = 7
        mapping["beit3_ds"]["task"] |= {"mixup": 0.0, "cutmix": 0.0}
        mapping["beit3_ds"]["training"]["total_steps"] = 2
    one, two = (run(mapping, tmp_path / str(i), 1 + i) for i, mapping in enumerate(mappings))
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=5e-5)


def test_a_linear_layer_trains(scenes: Path, tmp_path: Path) -> None:
    mapping = mapping_of(scenes, tmp_path)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "imagenet", "num_classes": NUM_CLASSES, "head": "linear"}
    own["data"]["texts"]["samples_per_step"] = 0
    own["model"] |= {"inputs": ["images"], "final_norm": False}
    own["training"]["total_steps"] = 2
    own["tokenizers"] = {}
    assert run(mapping, tmp_path)[-1]["images"] == 11


def test_a_linear_layer_of_other_classes_is_refused(scenes: Path, tmp_path: Path) -> None:
    mapping = mapping_of(scenes, tmp_path)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "imagenet", "num_classes": NUM_CLASSES, "head": "linear"}
    own["data"]["texts"]["samples_per_step"] = 0
    own["model"] |= {"inputs": ["images"], "final_norm": False}
    task = build_task(build_run_config(mapping))
    task.adopt_weights(task.describe(), "--weights FILE")
    task.open(WHOLE)
    task.adopt_weights(task.describe() | {"class_digest": "0123456789abcdef"}, "--weights FILE")
    with pytest.raises(ConfigError, match="--weights FILE have a linear layer for another list of classes"):
        task.open(WHOLE)


def refused(scenes: Path, tmp_path: Path, **changes: Any) -> str:
    """Returns the message of a configuration with changes to its sections."""
    mapping = mapping_of(scenes, tmp_path)
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        target = mapping["beit3_ds"]
        for name in section.split("__"):
            target = target[name]
        target[key] = value
    with pytest.raises(ConfigError) as error:
        build_task(build_run_config(mapping)).open(WHOLE)
    return str(error.value)


def test_bad_input_is_refused(scenes: Path, tmp_path: Path) -> None:
    names = class_names()
    short = tmp_path / "short.txt"
    short.write_text("".join(f"{key} {name}\n" for key, name in list(names.items())[:-1]))
    source = [{"path": str(short), "format": "class_names"}]
    assert "num_classes=36, but" in refused(scenes, tmp_path, data__texts__train=source)
    fewer = {"data__texts__train": source, "data__texts__samples_per_step": 35, "task__num_classes": 35}
    assert "'s00000035', which is not among the 35 classes" in refused(scenes, tmp_path, **fewer)
    assert "Use 36 for an exact softmax" in refused(scenes, tmp_path, data__texts__samples_per_step=37)
    assert "need the names of all 36 classes" in refused(scenes, tmp_path, data__texts__samples_per_step=7)
    assert "has no {name}" in refused(scenes, tmp_path, task__prompt="a photo")
    assert "learns from one class per image" in refused(scenes, tmp_path, task__head="linear")
    assert "needs exactly one there" in refused(
        scenes, tmp_path, data__texts__train=[], data__texts__samples_per_step=0
    )
