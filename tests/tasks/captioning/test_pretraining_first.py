"""Compares (slow) pretraining on captioned images before fine-tuning with fine-tuning alone."""

from pathlib import Path
from typing import Any

import pytest

from beit3_ds.cli.main import main as run_command
from beit3_ds.sample_data.write_scenes import write_scenes
from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.tasks.captioning.test_learning import NUM_TRAIN, NUM_VALIDATION, write_captions
from tests.tasks.fine_tuning import train, write_json
from tests.tasks.learning import SEEDS, interval, learning_mapping, train_mapping, train_words

PRETRAINING_STEPS, STEPS = 300, 100
VISUAL = {
    **{"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_layers": 1, "decoder_layers": 0},
    **{"num_attention_heads": 2, "codebook_size": 32, "codebook_dim": 8, "ema_decay": 0.9},
}
"""Settings of the visual tokenizer in the fixtures."""


def write_squares(folder: Path) -> None:
    """Writes drawn squares with captions that contain all words of the scenes.

    The captions are written as lines of text and beside each image.
    """
    for split, count in (("train", NUM_TRAIN), ("validation", NUM_VALIDATION)):
        for number, caption in enumerate(write_captions(folder, split, count)):
            (folder / split / f"{number:06}.txt").write_text(caption)
    write_scenes(folder / "words", num_train=300, num_validation=1, size=16)


def run_mapping(
    folder: Path, files: Path, task: dict[str, Any], sources: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """Returns a run on pairs of squares; the model is that of `learning_mapping` with 16 patches."""
    words = train_words((files / "words" / "text.txt").read_text().splitlines(), files / "text.spm", 64)
    mapping = learning_mapping(folder, task, {**sources, "samples_per_step": 64}, words, seed, steps)
    model = {"patch_size": 8, "visual_vocab_size": VISUAL["codebook_size"]}
    mapping["beit3_ds"]["model"] |= {**model, "sub_layernorm": True, "initial_embedding_std": 0.4}
    return mapping


def pretrain(folder: Path, files: Path, seed: int) -> Path:
    """Pretrains on masked patches and words of the training pairs; returns the path of the exported weights."""
    sources = {split: [{"path": str(files / split), "format": "folder"}] for split in ("train", "validation")}
    mapping = run_mapping(folder, files, {"name": "pretraining"}, sources, seed, PRETRAINING_STEPS)
    mapping["beit3_ds"]["tokenizers"]["visual"] = {**VISUAL, "path": str(files / "visual.safetensors")}
    assert run_ranks(train, 1, str(write_json(folder, mapping)), timeout=1500) == [0]
    weights = folder / "weights.safetensors"
    assert run_command(["export", str(folder / "run"), str(weights)]) == 0
    return weights


def caption(folder: Path, files: Path, seed: int, steps: int, weights: Path | None = None) -> float:
    """Fine-tunes from weights or from initial values; returns the share of captions that are exactly right."""
    sources = {
        split: [{"path": str(files / f"{split}.jsonl"), "format": "caption_lines", "images": str(files)}]
        for split in ("train", "validation")
    }
    task = {"name": "captioning", "dropped_share": 0.0, "official_scores": False, "max_length": 24}
    mapping = run_mapping(folder, files, task, sources, seed, steps)
    if weights:
        mapping["beit3_ds"]["training"]["init_from"] = str(weights)
    return train_mapping(folder, mapping)["exact_match"]


@pytest.mark.slow
def test_pretraining_first_beside_fine_tuning_alone(tmp_path: Path) -> None:
    """Compares fine-tuning with and without pretraining on the same captioned images.

    One comparison has equal fine-tuning steps, another has equal total steps. The figures are printed and may have any
    value. The test only requires that the longest runs learn, because the comparison would otherwise mean nothing.
    """
    files = tmp_path / "squares"
    files.mkdir()
    copy_tokenizers(files)
    write_squares(files)
    measured = []
    for seed in SEEDS:
        weights = pretrain(tmp_path / f"pretraining-{seed}", files, seed)
        first = caption(tmp_path / f"first-{seed}", files, seed, STEPS, weights)
        alone = caption(tmp_path / f"alone-{seed}", files, seed, STEPS)
        longer = caption(tmp_path / f"longer-{seed}", files, seed, PRETRAINING_STEPS + STEPS)
        measured.append((first, alone, longer))
        print(f"seed {seed}: exact captions, pretrained {first:.3f}, alone {alone:.3f}, alone for longer {longer:.3f}")
    low, high = interval([first - alone for first, alone, _ in measured])
    print(f"pretrained - alone {low:.3f} to {high:.3f}")
    assert min(longer for _, _, longer in measured) > 0.5
