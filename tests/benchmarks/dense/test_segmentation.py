"""Tests that the segmentation benchmark compares equal models.

The reference is the Mask2Former of transformers on this project's trunk and adapter.
"""

import dataclasses
import re

import pytest
import torch

from beit3_ds.benchmarks.dense.segmentation import TransformersModel, bench_config, build_model
from beit3_ds.model.vit_adapter import AdapterConfig
from beit3_ds.tasks.segmentation.config import DecoderConfig
from beit3_ds.tasks.segmentation.mask_loss import TermCounts
from beit3_ds.tasks.segmentation.model import SegmentationModel
from beit3_ds.tasks.segmentation.packing import label_targets, pack_windows

_NORMS = {"conv": "0", "norm": "1"}


@pytest.fixture(scope="module")
def models() -> tuple[SegmentationModel, TransformersModel]:
    model, settings = bench_config()
    decoder = DecoderConfig(
        hidden_size=64, ffn_hidden_size=64, pixel_ffn_hidden_size=64, num_heads=2, num_pixel_layers=1, num_queries=8
    )
    settings = dataclasses.replace(
        settings, adapter=AdapterConfig(conv_channels=4, num_heads=2), decoder=decoder, num_points=64
    )
    model = dataclasses.replace(model, num_layers=4, hidden_size=32, ffn_hidden_size=32, num_attention_heads=2)
    ours = build_model(dataclasses.replace(model, image_size=64), settings, torch.device("cpu"))
    theirs = TransformersModel(ours, settings)
    head, whole = ours.heads, theirs.whole
    assert head is not None
    pixels = {
        re.sub(r"\.(conv|norm)\.", lambda found: f".{_NORMS[found[1]]}.", name): value
        for name, value in head.decoder.pixels.state_dict().items()
    }
    whole.model.pixel_level_module.decoder.load_state_dict(pixels)
    whole.model.transformer_module.load_state_dict(head.decoder.queries.state_dict())
    whole.class_predictor.load_state_dict(head.decoder.classes.state_dict())
    return ours, theirs


def test_scores_are_equal(models: tuple[SegmentationModel, TransformersModel]) -> None:
    ours, theirs = models
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(ours(pack_windows(list(pixels), 16), None), theirs.scores(pixels))


def test_losses_of_one_image_are_equal(models: tuple[SegmentationModel, TransformersModel]) -> None:
    """Checks the loss of a single image.

    For a batch, transformers divides by the masks of the batch and draws points for all images, so losses differ.
    """
    ours, theirs = models
    pixels, seed = torch.rand(1, 3, 64, 64) * 2 - 1, 5
    labels = torch.tensor([[3, 3, 0, 7], [1, 1, 0, 7]], dtype=torch.uint8).repeat_interleave(32, 0)
    labels = labels.repeat_interleave(16, 1)[None]
    targets, host_targets = label_targets(labels.numpy(), [seed])
    batch = dataclasses.replace(pack_windows(list(pixels), 16), targets=targets, host_targets=host_targets)
    classes = labels[0].unique()
    counts = TermCounts.of(len(classes), 8)
    factors = torch.tensor([2 / counts.classes, 5 / counts.masks, 5 / counts.masks])
    torch.manual_seed(seed)
    expected = theirs.loss(pixels, [(labels[0] == classes[:, None, None]).float()], [classes.long()])
    torch.testing.assert_close(ours(batch, factors).total, expected)
