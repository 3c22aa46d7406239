"""Compares (slow) trunks pretrained on masked patches of drawn scenes with random trunks, for segmentation."""

import random
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli.main import main as run_command
from beit3_ds.sample_data.label_scenes import write_label_scenes
from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping
from tests.tasks.captioning.test_pretraining_first import VISUAL
from tests.tasks.fine_tuning import train, write_json
from tests.tasks.learning import SEEDS, train_mapping
from tests.tasks.segmentation.label_files import small_cpu_mapping

UNLABELLED, LABELLED, HELD_OUT = 1600, 200, 100
PRETRAINING_STEPS, STEPS = 300, 100
LEAST_MIOU = 0.2


def write_files(folder: Path, seed: int) -> None:
    """Writes labelled scenes, held-out ones, and more scenes for pretraining, which reads no labels."""
    for name, split, count in (
        ("unlabelled", "train", UNLABELLED),
        ("labelled", "train", LABELLED),
        ("labelled", "validation", HELD_OUT),
    ):
        write_label_scenes(folder / name, split, count, random.Random(f"{seed} {name} {split}"), 64)


def pretrain(folder: Path, files: Path, seed: int) -> Path:
    """Pretrains the trunk of the small configuration on masked patches; returns the exported weights."""
    mapping: dict[str, Any] = small_run_mapping(0)
    own = mapping["beit3_ds"]
    model = small_cpu_mapping(folder, files, seed)["beit3_ds"]["model"]
    own["model"] = {key: value for key, value in model.items() if key not in ("dense", "final_norm")}
    own["model"]["visual_vocab_size"] = VISUAL["codebook_size"]
    images = {"train": "unlabelled/images/training", "validation": "labelled/images/validation"}
    sources = {split: [{"path": str(files / name), "format": "folder"}] for split, name in images.items()}
    own["data"] = {"images": {**sources, "samples_per_step": 32}, "num_workers": 0}
    folder.mkdir()
    copy_tokenizers(folder)
    own["tokenizers"] = {"visual": {**VISUAL, "path": str(folder / "visual.safetensors")}}
    own["training"] = {"output_dir": str(folder / "run"), "total_steps": PRETRAINING_STEPS, "warmup_steps": 30}
    own["training"] |= {"learning_rate": 2e-3, "seed": seed, "log_interval": 50, "save_interval": PRETRAINING_STEPS}
    assert run_ranks(train, 1, str(write_json(folder, mapping)), timeout=1500) == [0]
    weights = folder / "weights.safetensors"
    assert run_command(["export", str(folder / "run"), str(weights)]) == 0
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_pretrained_trunk_beside_random_trunk(seed: int, tmp_path: Path) -> None:
    """Prints mIoU of equal fine-tuning from a pretrained and from a random trunk, with and without an adapter.

    No difference is required. Every run must learn, because otherwise the comparison says nothing.
    """
    write_files(tmp_path, seed)
    weights = pretrain(tmp_path / "pretraining", tmp_path, seed)
    found: dict[str, float] = {}
    for adapter in ("adapter", "no adapter"):
        for trunk in ("pretrained", "random"):
            name = f"{trunk}, {adapter}"
            mapping = small_cpu_mapping(
                tmp_path / name, tmp_path / "labelled", seed, STEPS, with_adapter=adapter == "adapter"
            )
            mapping["beit3_ds"]["model"]["visual_vocab_size"] = VISUAL["codebook_size"]
            if trunk == "pretrained":
                mapping["beit3_ds"]["training"]["init_from"] = str(weights)
            found[name] = train_mapping(tmp_path / name, mapping)["mIoU"]
    print(f"seed {seed}: mIoU " + "; ".join(f"{name} {score:.3f}" for name, score in found.items()))
    assert min(found.values()) > LEAST_MIOU
