"""Tests that classes are learned by name, and that classes without training images are recognised by name."""

import json
import math
import os
import random
import shutil
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from beit3_ds.sample_data.scenes import COLORS, SHAPES
from beit3_ds.sample_data.write_scenes import class_names, write_classes
from tests.fashion_mnist import CLASSES, fashion_mnist
from tests.ranks import run_ranks

CONFIG = Path(__file__).parents[3] / "ds_configs" / "imagenet_small_cpu.json"
SEEDS = (1, 2, 3)
STEPS = 180
IMAGES = {"train": 3600, "validation": 720}
FASHION_IMAGES = {"train": 4000, "validation": 1500}
FASHION_UNSEEN = ("shirt", "ankle boot")
UNSEEN = {f"{color} {shape}" for color, shape in zip(COLORS, SHAPES, strict=True)}
"""Classes without training images; every word of these names occurs in other names."""


def write_data(folder: Path, seed: int) -> None:
    """Writes images into `train`, `seen` and `unseen`, and three class lists.

    The lists are: trained classes, all classes, and all classes with exchanged names.
    """
    names = class_names()
    for split, count in IMAGES.items():
        write_classes(folder / split, count, random.Random(f"{seed} {split}"), 64)
    for key, name in names.items():
        if name in UNSEEN:
            shutil.rmtree(folder / "train" / key)
        (folder / ("unseen" if name in UNSEEN else "seen")).mkdir(exist_ok=True)
        (folder / "validation" / key).rename(folder / ("unseen" if name in UNSEEN else "seen") / key)
    write_lists(folder, names, UNSEEN, seed)


def write_lists(folder: Path, names: dict[str, str], unseen: Collection[str], seed: int) -> None:
    """Writes three class lists: trained classes, all classes, and all classes with exchanged names."""
    shuffled = list(names.values())
    random.Random(seed).shuffle(shuffled)
    lists = {"seen": {key: name for key, name in names.items() if name not in unseen}, "all": names}
    lists["shuffled"] = dict(zip(names, shuffled, strict=True))
    for list_name, classes in lists.items():
        text = "".join(f"{key} {name}\n" for key, name in classes.items())
        (folder / f"{list_name}.txt").write_text(text)


def write_fashion(folder: Path, seed: int) -> None:
    """Writes Fashion-MNIST in the layout of `write_data`; two classes have no training images."""
    names = {f"f{label}": name for label, name in enumerate(CLASSES)}
    for split, source in (("train", "train"), ("validation", "t10k")):
        pixels, labels = fashion_mnist(source, FASHION_IMAGES[split])
        for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            is_unseen = CLASSES[label] in FASHION_UNSEEN
            if split == "train" and is_unseen:
                continue
            part = "train" if split == "train" else "unseen" if is_unseen else "seen"
            path = folder / part / f"f{label}" / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).convert("RGB").resize((64, 64)).save(path)
    write_lists(folder, names, FASHION_UNSEEN, seed)


def write_config(folder: Path, split: str, classes: str, tokenizer: str, seed: int) -> Path:
    mapping: dict[str, Any] = json.loads(CONFIG.read_text())
    own = mapping["beit3_ds"]
    number = len((folder / f"{classes}.txt").read_text().splitlines())
    own["task"]["num_classes"] = own["data"]["texts"]["samples_per_step"] = number
    own["data"]["images"] |= {"train": [str(folder / "train")], "validation": [str(folder / split)]}
    own["data"]["texts"]["train"] = [{"path": str(folder / f"{classes}.txt"), "format": "class_names"}]
    own["tokenizers"]["text"] |= {"path": tokenizer, "vocab_size": 300}
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": STEPS, "seed": seed, "save_interval": STEPS}
    own["training"] |= {"eval_interval": STEPS}
    path = folder / f"{split}-{classes}.json"
    path.write_text(json.dumps(mapping))
    return path


def train(config: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main([config])


def evaluate(config: str, weights: str, out: str) -> int:
    """Evaluates a run on one rank and returns the exit status."""
    from beit3_ds.evaluate import main

    return main([config, "--weights", weights, "--out", out])


def measure(
    folder: Path, tokenizer: str, seed: int, write: Callable[[Path, int], None] = write_data
) -> dict[str, float]:
    """Trains with one seed; returns the accuracies by name."""
    folder.mkdir(parents=True)
    write(folder, seed)
    assert run_ranks(train, 1, str(write_config(folder, "seen", "seen", tokenizer, seed)), timeout=1800) == [0]
    found = {}
    for split, classes in (("seen", "seen"), ("unseen", "all"), ("unseen", "shuffled")):
        config, out = write_config(folder, split, classes, tokenizer, seed), folder / f"{split}-{classes}"
        assert run_ranks(evaluate, 1, str(config), str(folder / "run"), str(out)) == [0]
        found[f"{split}, {classes}"] = json.loads((out / "metrics.json").read_text())["metrics"]["accuracy"]
    return found


def lower_bound(differences: list[float]) -> float:
    """Returns the lower end of the two-sided 95% confidence interval of the mean of three values (Student's t)."""
    return statistics.mean(differences) - 4.303 * statistics.stdev(differences) / math.sqrt(len(differences))


@pytest.mark.slow
def test_classes_are_learned_by_their_names(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    """Checks that unseen classes are recognised far above chance, but not if class names are exchanged."""
    found = [measure(tmp_path / str(seed), tokenizer_files["text"], seed) for seed in SEEDS]
    for seed, accuracies in zip(SEEDS, found, strict=True):
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    seen_chance = 1 / (len(class_names()) - len(UNSEEN))
    assert lower_bound([of["seen, seen"] - seen_chance for of in found]) > 0.5
    assert lower_bound([of["unseen, all"] - of["unseen, shuffled"] for of in found]) > 0


@pytest.mark.slow
def test_fashion_is_learned_by_its_names(tmp_path: Path, tokenizer_files: dict[str, str]) -> None:
    """Checks that eight classes of Fashion-MNIST are recognised by name.

    The accuracy of the other two classes is only printed. Their names share no word with trained names, except "shirt"
    in "t-shirt", so they say nothing about the images.
    """
    found = [measure(tmp_path / str(seed), tokenizer_files["text"], seed, write_fashion) for seed in SEEDS]
    for seed, accuracies in zip(SEEDS, found, strict=True):
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    assert lower_bound([of["seen, seen"] - 1 / 8 for of in found]) > 0.3
