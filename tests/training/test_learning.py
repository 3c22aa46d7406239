"""Slow: the model learns what an image says about its caption, not only what captions look like."""

import dataclasses
import math
import statistics
from pathlib import Path

import pytest
import torch
from tests.ranks import run_ranks
from tests.run_config import quickstart_mapping

from beit3_ds.batch import PackedBatch

SEEDS = (1, 2, 3)
T_95_TWO_DEGREES = 4.303  # Student's t for a two-sided 95% interval over three seeds


def measure_seed(folder: str, tokenizers: dict[str, str], seed: int) -> tuple[float, float]:
    """Trains the quickstart's model, mostly on pairs; returns held-out caption loss with the right and wrong images."""
    from beit3_ds.config import build_run_config
    from beit3_ds.pretrain import build_run
    from beit3_ds.tokenizers.text import load_text_tokenizer
    from beit3_ds.training.evaluation import evaluate
    from beit3_ds.training.loop import train

    mapping = quickstart_mapping()
    for key in ("csv_monitor", "tensorboard"):
        del mapping[key]
    own = mapping["beit3_ds"]
    for stream, samples in (("images", 8), ("pairs", 48), ("texts", 8)):
        own["data"][stream]["samples_per_step"] = samples
    own["tokenizers"]["text"]["path"] = tokenizers["text"]
    own["tokenizers"]["visual"]["path"] = tokenizers["visual"]
    training = {"total_steps": 400, "warmup_steps": 40, "eval_interval": 400, "save_interval": 400, "log_interval": 50}
    own["training"] |= {**training, "output_dir": folder, "seed": seed, "eval_samples": 96}
    config = build_run_config(mapping)
    run, steps = build_run(config, load_text_tokenizer(config))
    train(run, steps)
    parts = (run.visual_tokenizer, run.mesh, run.device)
    right = evaluate(run.engine, run.heldout, *parts)["pair_mlm"]
    wrong = evaluate(run.engine, [with_wrong_images(batch) for batch in run.heldout], *parts)["pair_mlm"]
    return right, wrong


def with_wrong_images(batch: PackedBatch) -> PackedBatch:
    """The same captions and masks, each pair with the image of the pair half a batch away."""
    order = torch.arange(batch.num_pairs).roll(batch.num_pairs // 2) + batch.num_images
    order = torch.cat([torch.arange(batch.num_images), order])
    pixels, views, masks = batch.pixels[order], batch.tokenizer_pixels[order], batch.patch_mask[order]
    return dataclasses.replace(batch, pixels=pixels, tokenizer_pixels=views, patch_mask=masks)


@pytest.mark.slow
def test_captions_are_read_off_images(trained_tokenizers: dict[str, str], tmp_path: Path) -> None:
    differences = []
    for seed in SEEDS:
        ((right, wrong),) = run_ranks(measure_seed, 1, str(tmp_path / str(seed)), trained_tokenizers, seed, timeout=1800)
        print(f"seed {seed}: held-out pair MLM {right:.4f} with the right image, {wrong:.4f} with a wrong one")
        differences.append(wrong - right)
    mean = statistics.mean(differences)
    half = T_95_TWO_DEGREES * statistics.stdev(differences) / math.sqrt(len(differences))
    print(f"difference {mean:.4f} +- {half:.4f} nats")
    assert mean - half > 0
