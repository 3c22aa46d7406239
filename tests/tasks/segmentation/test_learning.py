"""Tests that segmentation learns drawn scenes, with and without an adapter, and nothing from shuffled images."""

import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from beit3_ds.sample_data.label_scenes import write_label_scenes
from tests.tasks.learning import SEEDS, train_mapping
from tests.tasks.segmentation.label_files import small_cpu_mapping

IMAGES = {"train": 1600, "validation": 100}
LEAST_MIOU = 0.4


def _write_shuffled(data: Path, folder: Path, seed: int) -> None:
    """Copies a dataset and gives each training label map another image of equal size."""
    shutil.copytree(data, folder)
    images, labels = folder / "images" / "training", folder / "annotations" / "training"
    names = sorted(path.name for path in images.iterdir())
    order = names[1:] + names[:1]
    random.Random(seed).shuffle(order)
    for path in images.iterdir():
        path.unlink()
        (labels / path.name).unlink()
    for name, other in zip(names, order, strict=True):
        label = Image.open(data / "annotations" / "training" / name)
        label.save(labels / name)
        Image.open(data / "images" / "training" / other).resize(label.size).save(images / name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_scenes_are_learned(seed: int, tmp_path: Path) -> None:
    """Held-out scenes reach mIoU .4 with an adapter; a model trained on shuffled images knows no shape.

    The figure without an adapter is printed, and only required to be above that of shuffled images.
    """
    data = tmp_path / "data"
    for split, count in IMAGES.items():
        write_label_scenes(data, split, count, random.Random(f"{seed} {split}"), 64)
    _write_shuffled(data, tmp_path / "shuffled-data", seed)
    found: dict[str, float] = {}
    for name, source in (("adapter", data), ("no adapter", data), ("shuffled", tmp_path / "shuffled-data")):
        mapping = small_cpu_mapping(tmp_path / name, source, seed, with_adapter=name != "no adapter")
        found[name] = train_mapping(tmp_path / name, mapping)["mIoU"]
    print(f"seed {seed}: mIoU " + ", ".join(f"{name} {score:.3f}" for name, score in found.items()))
    assert found["adapter"] >= LEAST_MIOU
    assert found["shuffled"] < min(LEAST_MIOU / 2, found["no adapter"])
