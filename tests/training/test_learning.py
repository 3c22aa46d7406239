"""Tests (slow) that the model uses the image when it predicts a masked caption."""

import dataclasses
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.tasks.pretraining.targets import with_masks
from tests.ranks import run_ranks
from tests.run_config import quickstart_mapping

SEEDS = (1, 2, 3)
T_95_TWO_DEGREES = 4.303  # Student's t for a two-sided 95% interval over three seeds


def measure_seed(folder: str, visual_tokenizer: str, seed: int) -> tuple[float, float]:
    """Trains the quickstart's model on pairs; returns the validation caption losses with right and wrong images."""
    from beit3_ds.config import build_run_config
    from beit3_ds.data.images.shards import TarShards
    from beit3_ds.runtime.process_group import joined_ranks
    from beit3_ds.runtime.stop_signals import StopSignals
    from beit3_ds.tokenizers import train_text_tokenizer
    from beit3_ds.train import build_run, open_inputs
    from beit3_ds.training.evaluation import evaluate
    from beit3_ds.training.loop import train

    config = build_run_config(pairs_only_mapping(folder, visual_tokenizer, seed))
    # Pieces are learned from captions alone, so that a masked piece is mostly a word, not a letter.
    shards = TarShards([source.path for source in config.data.pairs.train])
    train_text_tokenizer(config.tokenizers.text, [shards.caption(i) for i in range(len(shards))])
    inputs = open_inputs(config)
    with joined_ranks(config.parallel) as mesh:
        signals = StopSignals()
        run, steps = build_run(config, inputs, mesh, signals)
        train(run, steps, signals)
        parts = (run.visual_tokenizer, run.mesh, run.device)
        right = evaluate(run.schedule, run.validation, *parts)["pair_mlm"]
        wrong = evaluate(run.schedule, [with_wrong_images(batch) for batch in run.validation], *parts)["pair_mlm"]
    return right, wrong


def pairs_only_mapping(folder: str, visual_tokenizer: str, seed: int) -> dict[str, Any]:
    """Returns the quickstart's configuration for pairs only, with milder crops and fewer steps."""
    mapping = quickstart_mapping()
    for key in ("csv_monitor", "tensorboard"):
        del mapping[key]
    own = mapping["beit3_ds"]
    for stream, samples in (("images", 0), ("pairs", 64), ("texts", 0)):
        own["data"][stream]["samples_per_step"] = samples
    own["data"] |= {"min_crop_scale": 0.6, "color_jitter": 0.2}
    own["model"] |= {"num_vision_language_layers": 3, "drop_path_rate": 0.0}
    own["tokenizers"]["text"] |= {"path": f"{folder}.spm", "vocab_size": 600}
    own["tokenizers"]["visual"]["path"] = visual_tokenizer
    own["training"] |= {"output_dir": folder, "seed": seed, "total_steps": 300, "learning_rate": 2e-3}
    own["training"] |= {"eval_interval": 300, "save_interval": 300, "log_interval": 50, "eval_samples": 96}
    return mapping


def with_wrong_images(batch: PackedBatch) -> PackedBatch:
    """Returns the captions and masks unchanged, each with the image of the pair half a batch away."""
    order = torch.arange(batch.num_pairs).roll(batch.num_pairs // 2) + batch.num_images
    order = torch.cat([torch.arange(batch.num_images), order])
    pixels, views, masks = batch.pixels[order], batch.targets["tokenizer_pixels"][order], batch.patch_mask[order]
    return with_masks(
        dataclasses.replace(batch, pixels=pixels, patch_mask=masks),
        masked_tokens=batch.targets["masked_tokens"],
        target_ids=batch.targets["target_ids"],
        tokenizer_pixels=views,
    )


@pytest.mark.slow
def test_captions_are_read_off_images(trained_visual_tokenizer: str, tmp_path: Path) -> None:
    differences = []
    for seed in SEEDS:
        arguments = (str(tmp_path / str(seed)), trained_visual_tokenizer, seed)
        ((right, wrong),) = run_ranks(measure_seed, 1, *arguments, timeout=1800)
        print(f"seed {seed}: validation pair MLM {right:.4f} with the right image, {wrong:.4f} with a wrong one")
        differences.append(wrong - right)
    mean = statistics.mean(differences)
    half = T_95_TWO_DEGREES * statistics.stdev(differences) / math.sqrt(len(differences))
    print(f"difference {mean:.4f} +- {half:.4f} nats")
    assert mean - half > 0
