"""Tests detection runs: layouts train equally, metrics are exact on any number of ranks, and runs resume."""

import csv
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from torch.nn import functional

from beit3_ds.config import ConfigError, load_run_config
from beit3_ds.sample_data.write_scenes import write_scenes
from beit3_ds.tasks import build_task
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
    run_mapping,
    train,
    train_layout,
    write_json,
)

TASK = {"name": "detection", "num_classes": 6, "pyramid_channels": 16, "box_width": 32, "anchor_scale": 4.0}
TASK |= {"proposals_per_level": 60, "proposals": 40, "sampled_anchors": 32, "sampled_boxes": 24, "min_scale": 0.6}
TASK |= {"max_scale": 1.3, "score_threshold": 0.0, "max_detections": 20}


def train_smoothly(config: str) -> int:
    """Trains on one rank with GELU in place of the heads' 20 layers of ReLU; returns the exit status.

    An update leaves weights of two layouts that differ by rounding. One activation that then lies on the other side of
    ReLU's kink changes a gradient by up to 2e-3, because few boxes contribute. So a bound for ReLU would hide mistakes.
    `test_head.py` compares ReLU in float64.
    """
    with patch.object(functional, "relu", functional.gelu):
        return train(config)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, num_train=12, num_validation=4, size=32)
    return folder


@pytest.fixture(scope="module")
def write_config(scenes: Path) -> WriteConfig:
    def write(folder: Path, layout: Layout = ONE_PROCESS, **training: Any) -> Path:
        mapping = run_mapping(folder, layout, TASK, **training)
        own = mapping["beit3_ds"]

        def source(split: str) -> dict[str, str]:
            path = str(scenes / f"objects-{split}.json")
            return {"path": path, "format": "coco_objects", "images": str(scenes / "images")}

        dense = {"window_size": 3, "global_blocks": [1], "relative_positions": True}
        own["model"] |= {"inputs": ["images"], "image_size": 64, "patch_size": 16, "dense": dense}
        own["model"] |= {"num_vision_language_layers": 0}
        splits = {"train": [source("train")], "validation": [source("validation")]}
        own["data"] |= {"images": {**splits, "samples_per_step": 8}, "color_jitter": 0.0}
        own["tokenizers"] = {}
        return write_json(folder, mapping)

    return write


@pytest.fixture(scope="module")
def one_process(write_config: WriteConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_layout(write_config, tmp_path_factory.mktemp("detection") / "one", program=train_smoothly)


def test_it_writes_its_results(one_process: Path) -> None:
    folder = one_process / "run" / "validation"
    boxes, masks = (json.loads((folder / f"{name}.json").read_text()) for name in ("boxes", "masks"))
    assert len(boxes) == len(masks) and {entry["image_id"] for entry in boxes} <= {9, 25, 41, 57}
    assert set(boxes[0]) == {"image_id", "category_id", "score", "bbox"}
    assert masks[0]["segmentation"]["size"][0] <= 64 and isinstance(masks[0]["segmentation"]["counts"], str)
    rows = list(csv.DictReader((folder / "classes.csv").read_text().splitlines()))
    assert [row["category"] for row in rows] == ["circle", "square", "triangle", "cross", "ring", "bar"]
    assert {"box_AP", "mask_AP50", "box_AP_small"} <= rows[0].keys()
    assert "data:image/jpeg" in (folder / "detections.html").read_text()


@pytest.mark.parametrize("layout", COVERING)
def test_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", COVERING[layout], train_smoothly)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL)
def test_all_layouts_train_the_same(layout: str, write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_layout_trains_the_same(write_config, one_process, tmp_path / "run", ALL[layout], train_smoothly)


def test_it_resumes_bit_for_bit(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    check_resumes_bit_for_bit(write_config, one_process, tmp_path / "resumed", train_smoothly)


def test_the_planner_counts_the_images_of_prefetched_steps(write_config: WriteConfig, tmp_path: Path) -> None:
    check_planned_shared_memory(write_config, tmp_path)


def test_metrics_do_not_depend_on_the_ranks(write_config: WriteConfig, one_process: Path, tmp_path: Path) -> None:
    metrics = check_metrics_do_not_depend_on_ranks(write_config, one_process, tmp_path)
    assert {"box_AP", "box_AP50", "mask_AP", "mask_AR"} <= metrics.keys()


def test_it_needs_the_dense_backbone_and_the_right_number_of_classes(write_config: WriteConfig, tmp_path: Path) -> None:
    path = write_config(tmp_path)
    with pytest.raises(ConfigError, match=r"model\.dense is not set"):
        build_task(load_run_config(str(path), ["model.dense=null"]))
    task = build_task(load_run_config(str(path), ["task.num_classes=7"]))
    from beit3_ds.tasks.rank_task import RankShare

    share = RankShare(data_parallel_rank=0, data_parallel_size=1, embeds=True, predicts=True, reads=True)
    with pytest.raises(ConfigError, match=r"num_classes=7.*lists 6 categories"):
        task.open(share)
    task = build_task(load_run_config(str(path)))
    task.adopt_weights({"name": "detection", "categories": [[2, "circle"], [3, "dog"]]}, "some.safetensors")
    with pytest.raises(ConfigError, match=r"categories of some\.safetensors.*5 \('square'\) is missing there"):
        task.open(share)
