"""Tests (slow) that retrieval transfers to a drawing style that does not occur in training."""

import json
from pathlib import Path

import pytest

from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.tasks.fine_tuning import evaluate, train
from tests.tasks.learning import SEEDS, interval
from tests.tasks.retrieval.runs import write_config
from tests.tasks.retrieval.styles import write_styles

NUM_TRAIN, NUM_TEST, SIZE, STEPS = 2000, 200, 48, 500
MODEL = {
    **{"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4},
    **{"image_size": SIZE, "patch_size": 8, "drop_path_rate": 0.0, "initial_embedding_std": 0.4},
}
AUGMENTATION = {"min_crop_scale": 0.8, "color_jitter": 0.3, "rand_augment_operations": 0}
TRAINING = {
    **{"total_steps": STEPS, "warmup_steps": STEPS // 10, "learning_rate": 1.5e-3, "log_interval": 50},
    **{"eval_interval": STEPS, "eval_batch_size": 50, "save_interval": STEPS},
}
STYLES = ("seen", "unseen")
CHANCE = (1 + 5 + 10) / 3 / NUM_TEST
"""Mean recall of a random order: 0.027."""


def train_style(files: Path, folder: Path, trained: str, seed: int) -> dict[str, dict[str, float]]:
    """Trains on one file of pairs in a separate process; returns the metrics of both styles."""
    sources = {
        name: {"path": str(files / f"{name}.jsonl"), "images": str(files), "format": "caption_lines"}
        for name in (trained, *STYLES)
    }
    splits = {"train": [sources[trained]], "validation": [sources["seen"]], "test": [sources["unseen"]]}
    data = {"pairs": {**splits, "samples_per_step": 48}, **AUGMENTATION}
    config = write_config(files, folder, 0, None, 1, model=MODEL, data=data, training={**TRAINING, "seed": seed})
    assert run_ranks(train, 1, str(config), timeout=1500) == [0]
    arguments = [str(config), "--weights", str(folder / "run"), "--split", "test"]
    assert run_ranks(evaluate, 1, arguments, timeout=600) == [0]
    seen = json.loads((folder / "run" / "validation" / "retrieval.json").read_text())["metrics"]
    unseen = json.loads((folder / "run" / "evaluation" / "test" / "retrieval.json").read_text())["metrics"]
    return {"seen": seen, "unseen": unseen}


def measure(folder: Path, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Returns the metrics of both styles after training on right captions, and after training on shuffled ones."""
    folder.mkdir()
    copy_tokenizers(folder)
    write_styles(folder, seed, NUM_TRAIN, NUM_TEST, SIZE)
    found = {name: train_style(folder, folder / f"on-{name}", name, seed) for name in ("train", "shuffled")}
    for name, styles in found.items():
        for style, metrics in styles.items():
            figures = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
            print(f"seed {seed}, captions {name}, style {style}: {figures}")
    return found


@pytest.mark.slow
def test_it_finds_pictures_in_a_style_that_it_never_saw(tmp_path: Path) -> None:
    """Compares retrieval in an unseen style with chance and with models trained on captions of other images.

    Takes about three minutes per seed.
    """
    found = [measure(tmp_path / str(seed), seed) for seed in SEEDS]
    for style in STYLES:
        recalls = {name: [of[name][style]["mean_recall"] for of in found] for name in ("train", "shuffled")}
        low, high = interval([ours - other for ours, other in zip(*recalls.values(), strict=True)])
        shown = {name: [round(recall, 3) for recall in of] for name, of in recalls.items()}
        print(f"style {style}: {shown}, chance {CHANCE:.3f}; difference {low:.3f} to {high:.3f}")
        assert low > 0
        assert interval([recall - CHANCE for recall in recalls["train"]])[0] > 0
