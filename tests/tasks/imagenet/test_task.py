"""Tests ImageNet runs: classification by class names is equal in every layout, and bad settings are refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.sample_data.write_scenes import class_names, write_scenes
from beit3_ds.tasks import RankShare, build_task
from tests.tasks.fine_tuning import (
    ALL,
    COVERING,
    ONE_PROCESS,
    Layout,
    WriteConfig,
    check_layout_trains_the_same,
    check_metrics_do_not_depend_on_ranks,
    check_planned_shared_memory,
    check_resumes_bit_for_bit,
    figures,
    run_mapping,
    train_layout,
    write_json,
)

NUM_CLASSES = 36
WHOLE = RankShare(data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory, tokenizer_files: dict[str, str]) -> Path:
    """Writes one training image per class, and validation images for some classes only."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=NUM_CLASSES, num_validation=11, size=32)
    shutil.copy(tokenizer_files["text"], folder / "text.spm")
    return folder


def mapping_of(scenes: Path, folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> dict[str, Any]:
    task = {"name": "imagenet", "num_classes": NUM_CLASSES, "mixup": 0.8, "cutmix": 1.0}
    mapping = run_mapping(folder, layout, task, **{"learning_rate": 5e-4, **training})
    own = mapping["beit3_ds"]
    own["model"] |= {"inputs": ["images", "texts"], "num_vision_language_layers": 0}
    images = {split: [str(scenes / "classes" / split)] for split in ("train", "validation")}
    own["data"] |= {
        "images": {**images, "samples_per_step": 10},
        "texts": {"train": [{"path": str(scenes / "classes.txt"), "format": "class_names"}]},
        "text_length": 16,
        "rand_augment_operations": 1,
        "random_erasing": 0.2,
    }
    own["data"]["texts"]["samples_per_step"] = NUM_CLASSES
    own["tokenizers"] = {"text": {"path": str(scenes / "text.spm"), "vocab_size": 300}}
    return mapping


@pytest.fixture(scope="module")
def write_config(scenes: Path) -> WriteConfig:
    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        return write_json(folder, mapping_of(scenes, folder, layout, **training))

    return write


@pytest.fixture(scope="module")
def one_process(write_config: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write_config, tmp_path_factory.mktemp("imagenet") / "one")


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", COVERING[layout])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", ALL[layout])


def test_resumes_bit_for_bit(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write_config, one_process, tmp_path / "resumed")


def test_the_planner_counts_the_images_of_prefetched_steps(write_config: WriteConfig, tmp_path: Path) -> None:
    check_planned_shared_memory(write_config, tmp_path)


def test_metrics_do_not_depend_on_ranks(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(write_config, one_process, tmp_path)
    assert metrics["images"] == 11 and metrics["accuracy"] == figures(one_process, "validation")[-1]["accuracy"]


def test_answers_are_written(one_process: Path) -> None:
    folder = one_process / "run" / "validation"
    lines = [json.loads(line) for line in (folder / "classes.jsonl").read_text().splitlines()]
    assert len({line["image"] for line in lines}) == 11 and all(len(set(line["best"])) == 5 for line in lines)
    right = sum(line["best"][0] == line["class"] for line in lines) / 11
    assert right == figures(one_process, "validation")[-1]["accuracy"] and all(
        line["class"] in line["image"] for line in lines
    )
    page = (folder / "classes.html").read_text()
    assert page.count("<img src='data:image/jpeg;base64") == 11 and "red circle" in page


def test_some_classes_per_step(scenes: Path, tmp_path: Path) -> None:
    """Checks a step that compares only some classes: those of its images and randomly drawn ones.

    Two ranks must use the classes that one process uses.
    """

    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        mapping = mapping_of(scenes, folder, layout, **training)
        mapping["beit3_ds"]["data"]["texts"]["samples_per_step"] = 7
        mapping["beit3_ds"]["task"] |= {"mixup": 0.0, "cutmix": 0.0}
        return write_json(folder, mapping)

    one = train_layout(write, tmp_path / "one")
    check_layout_trains_the_same(write, one, tmp_path / "two", (2, 2, 2, {}))


def test_a_linear_layer_trains(scenes: Path, tmp_path: Path) -> None:
    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        return write_json(folder, linear_mapping(scenes, folder))

    assert figures(train_layout(write, tmp_path / "run"), "validation")[-1]["images"] == 11


def test_the_linear_layer_gets_the_smoothing_of_the_settings(scenes: Path, tmp_path: Path) -> None:
    mapping = linear_mapping(scenes, tmp_path)
    mapping["beit3_ds"]["task"]["label_smoothing"] = 0.25
    config = build_run_config(mapping)
    assert build_task(config).build_head(config.model, None).label_smoothing == 0.25


def linear_mapping(scenes: Path, folder: Path) -> dict[str, Any]:
    mapping = mapping_of(scenes, folder)
    own = mapping["beit3_ds"]
    own["task"] = {"name": "imagenet", "num_classes": NUM_CLASSES, "head": "linear"}
    own["data"]["texts"]["samples_per_step"] = 0
    own["model"] |= {"inputs": ["images"], "final_norm": False}
    own["tokenizers"] = {}
    return mapping


def test_a_linear_layer_of_other_classes_is_refused(scenes: Path, tmp_path: Path) -> None:
    mapping = linear_mapping(scenes, tmp_path)
    task = build_task(build_run_config(mapping))
    task.adopt_weights(task.describe(), "--weights FILE")
    task.open(WHOLE)
    task.adopt_weights(task.describe() | {"class_digest": "0123456789abcdef"}, "--weights FILE")
    with pytest.raises(ConfigError, match="--weights FILE have a linear layer for another list of classes"):
        task.open(WHOLE)


def refused(scenes: Path, tmp_path: Path, **changes: Any) -> str:
    """Returns the error message for a configuration with changes to its sections."""
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
