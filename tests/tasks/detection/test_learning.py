"""Tests that a detector overfits eight images, and finds nothing if trained with the objects of other images."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.sample_data.object_scenes import write_object_scenes
from tests.run_config import small_run_mapping
from tests.tasks.learning import SEEDS, evaluate_weights, train_mapping

IMAGES, STEPS = 8, 600


def _write(folder: Path, seed: int) -> None:
    """Writes `IMAGES` images of 96 pixels with their objects; a second file gives each image the next one's objects."""
    write_object_scenes(folder, "train", IMAGES, random.Random(f"overfit {seed}"), 96)
    content = json.loads((folder / "objects-train.json").read_text())
    (folder / "objects-copy.json").write_text(json.dumps(content))  # a run refuses to validate on the file it trains on
    identifiers = [image["id"] for image in content["images"]]
    following = dict(zip(identifiers, identifiers[1:] + identifiers[:1], strict=True))
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    for annotation in content["annotations"]:
        annotation["image_id"] = following[annotation["image_id"]]
        left, top, width, height = annotation["bbox"]
        limits = sizes[annotation["image_id"]]
        left, top = min(left, limits[0] - 4), min(top, limits[1] - 4)
        box = [left, top, min(width, limits[0] - left), min(height, limits[1] - top)]
        right, bottom = box[0] + box[2], box[1] + box[3]
        annotation |= {"bbox": box, "segmentation": [[left, top, right, top, right, bottom, left, bottom]]}
    (folder / "objects-shuffled.json").write_text(json.dumps(content))


def _mapping(folder: Path, data: Path, seed: int, file: str) -> dict[str, Any]:
    mapping = small_run_mapping(0, image_size=96, patch_size=16, hidden_size=128, ffn_hidden_size=256)
    own = mapping["beit3_ds"]
    own["model"] |= {"num_attention_heads": 4, "inputs": ["images"], "num_vision_language_layers": 0}
    own["model"] |= {"dense": {"window_size": 3, "global_blocks": [1]}, "initial_embedding_std": 0.4}
    own["model"] |= {"sub_layernorm": True, "drop_path_rate": 0.0}
    own["task"] = {"name": "detection", "num_classes": 6, "pyramid_channels": 32, "box_width": 128, "anchor_scale": 4.0}
    own["task"] |= {"proposals_per_level": 150, "proposals": 60, "sampled_anchors": 64, "sampled_boxes": 40}
    own["task"] |= {"min_scale": 1.0, "max_scale": 1.0}

    def source(name: str) -> dict[str, str]:
        return {"path": str(data / f"objects-{name}.json"), "format": "coco_objects", "images": str(data / "images")}

    images = {"train": [source(file)], "validation": [source("copy")], "samples_per_step": IMAGES}
    own["data"] = {"images": images, "num_workers": 0, "color_jitter": 0.0, "flip_probability": 0.0}
    own["tokenizers"] = {}
    own["training"] = {"output_dir": str(folder / "run"), "total_steps": STEPS, "warmup_steps": 20, "seed": seed}
    own["training"] |= {"learning_rate": 1e-3, "log_interval": 25, "eval_interval": STEPS, "save_interval": STEPS}
    return mapping


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_it_overfits_eight_images(seed: int, tmp_path: Path) -> None:
    """Checks the average precision of an overfitted detector; BENCHMARKS.md has the measured values."""
    _write(tmp_path, seed)
    found = train_mapping(tmp_path / "true", _mapping(tmp_path / "true", tmp_path, seed, "train"))
    assert found["box_AP50"] >= 0.9 and found["mask_AP50"] >= 0.85
    for num_ranks in (2, 3):  # unlike the tiny models of `test_task.py`, this one finds objects
        folder = tmp_path / f"{num_ranks} ranks"
        metrics = evaluate_weights(
            folder, _mapping(folder, tmp_path, seed, "train"), tmp_path / "true" / "run", num_ranks=num_ranks
        )
        assert metrics == {name: found[name] for name in metrics}
    flipped = _mapping(tmp_path / "views", tmp_path, seed, "train")
    flipped["beit3_ds"]["task"] |= {"test_sizes": [96, 112], "test_flip": True}
    views = evaluate_weights(tmp_path / "views", flipped, tmp_path / "true" / "run")
    assert views["box_AP50"] >= 0.3  # the model has seen neither flips nor other sizes


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_targets_of_other_images_teach_nothing(seed: int, tmp_path: Path) -> None:
    _write(tmp_path, seed)
    shuffled = train_mapping(tmp_path / "shuffled", _mapping(tmp_path / "shuffled", tmp_path, seed, "shuffled"))
    assert shuffled["box_AP50"] < 0.05 and shuffled["mask_AP50"] < 0.05
