"""Shows that retrieval learns what transfers to a drawing style that it was not trained on."""

import json
from pathlib import Path

import pytest

from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.tasks.fine_tuning import evaluate, train
from tests.tasks.retrieval.runs import write_config
from tests.tasks.retrieval.styles import write_styles

NUM_TRAIN, NUM_TEST, SIZE, STEPS = 2000, 200, 48, 300
SEEDS = (1, 2, 3)
MODEL = {
    **{"num_layers": 3, "hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4},
    **{"image_size": SIZE, "patch_size": 12, "drop_path_rate": 0.0},
}
AUGMENTATION = {"min_crop_scale": 0.8, "color_jitter": 0.3, "rand_augment_operations": 0}
TRAINING = {
    **{"total_steps": STEPS, "warmup_steps": STEPS // 10, "learning_rate": 7e-4, "log_interval": 50},
    **{"eval_interval": STEPS, "eval_batch_size": 50, "save_interval": STEPS},
}


def train_style(files: Path, folder: Path, trained: str, seed: int) -> dict[str, dict[str, float]]:
    """Trains on a file of pairs in a process of its own; returns the metrics of both styles."""
    sources = {
        name: {"path": str(files / f"{name}.jsonl"), "images": str(files), "format": "caption_lines"}
        for name in (trained, "seen", "unseen")
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_it_finds_pictures_in_a_style_that_it_never_saw(seed: int, tmp_path: Path) -> None:
    """Compares with captions of other images; chance is 5% at 10 images of 200. About two CPU minutes per seed."""
    copy_tokenizers(tmp_path)
    write_styles(tmp_path, seed, NUM_TRAIN, NUM_TEST, SIZE)
    found = {name: train_style(tmp_path, tmp_path / f"on-{name}", name, seed) for name in ("train", "shuffled")}
    for name, styles in found.items():
        for style, metrics in styles.items():
            figures = "  ".join(f"{key} {value:.3f}" for key, value in metrics.items())
            print(f"seed {seed}, captions {name}, style {style}: {figures}")
    for style, factor in (("seen", 3.0), ("unseen", 1.5)):
        assert found["train"][style]["mean_recall"] > factor * found["shuffled"][style]["mean_recall"]
