"""Writes small datasets and configurations for the tests of segmentation."""

import json
import random
from pathlib import Path
from typing import Any

from beit3_ds.sample_data.label_scenes import LABEL_NAMES, write_label_scenes
from tests.run_config import CONFIGS
from tests.tasks.fine_tuning import ONE_PROCESS, Layout, run_mapping, write_json

ADAPTER = {"conv_channels": 4, "num_interactions": 2, "num_heads": 2, "num_extra_extractors": 1, "initial_scale": 0.1}
DECODER = {
    "hidden_size": 64,
    "ffn_hidden_size": 32,
    "pixel_ffn_hidden_size": 32,
    "num_heads": 2,
    "num_pixel_layers": 1,
    "num_query_layers": 3,
    "num_queries": 12,
}
SETTINGS = {
    "name": "segmentation",
    "num_classes": len(LABEL_NAMES),
    "adapter": ADAPTER,
    "decoder": DECODER,
    "num_points": 64,
    "window_stride": 40,
    "scales": [1.0, 1.5],
    "flips": True,
}


def write_dataset(folder: Path, num_train: int = 12, num_validation: int = 5) -> None:
    """Writes drawn scenes in the folder layout of ADE20K; the shorter side has 40 pixels."""
    for split, count in (("train", num_train), ("validation", num_validation)):
        write_label_scenes(folder, split, count, random.Random(split), 40)


def segmentation_mapping(
    folder: Path, layout: Layout = ONE_PROCESS, *, data: Path, task: dict[str, Any] | None = None, **training: Any
) -> dict[str, Any]:
    """Returns a run of four steps on crops of 64 pixels."""
    mapping = run_mapping(folder, layout, SETTINGS | (task or {}), **training)
    own = mapping["beit3_ds"]
    own["model"] |= {"inputs": ["images"], "image_size": 64, "patch_size": 16, "dense": {}}
    own["model"]["final_norm"] = own["task"]["adapter"] is None
    sources = {split: [{"path": str(data), "format": "ade20k", "split": split}] for split in ("training", "validation")}
    own["data"]["images"] = {"train": sources["training"], "validation": sources["validation"], "samples_per_step": 8}
    return mapping


def write_config(
    folder: Path, layout: Layout = ONE_PROCESS, *, data: Path, task: dict[str, Any] | None = None, **training: Any
) -> Path:
    """Writes the configuration of `segmentation_mapping`; returns the path."""
    return write_json(folder, segmentation_mapping(folder, layout, data=data, task=task, **training))


def small_cpu_mapping(
    folder: Path, data: Path, seed: int, steps: int | None = None, *, with_adapter: bool = True
) -> dict[str, Any]:
    """Returns the shipped small configuration on other scenes; `steps` of None keeps the steps of the file."""
    mapping: dict[str, Any] = json.loads((CONFIGS / "segmentation_small_cpu.json").read_text())
    own = mapping["beit3_ds"]
    for split in ("train", "validation"):
        own["data"]["images"][split][0]["path"] = str(data)
    steps = steps or own["training"]["total_steps"]
    own["training"] |= {"output_dir": str(folder / "run"), "seed": seed, "total_steps": steps}
    own["training"] |= {"eval_interval": steps, "save_interval": steps}
    if not with_adapter:
        own["task"]["adapter"], own["model"]["final_norm"] = None, True
    return mapping
