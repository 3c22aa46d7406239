"""Compares the sums of Mask2Former's loss with transformers, and over different divisions of a step."""

# B images, Q queries, C classes.

import pytest
import torch
from torch import Tensor

from beit3_ds.tasks.segmentation.config import IGNORED, DecoderConfig, SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import (
    MaskDecoder,
    QueryPredictions,
    decoder_initial_value,
    mask2former_config,
    mask2former_parts,
)
from beit3_ds.tasks.segmentation.mask_loss import MaskLoss, TermCounts

SETTINGS = SegmentationConfig(
    num_classes=4,
    num_points=48,
    decoder=DecoderConfig(
        hidden_size=64,
        ffn_hidden_size=32,
        pixel_ffn_hidden_size=32,
        num_heads=2,
        num_pixel_layers=1,
        num_query_layers=2,
        num_queries=6,
    ),
)
CPU = torch.device("cpu")


def _labels() -> Tensor:
    labels = torch.zeros(3, 16, 16, dtype=torch.uint8)
    labels[0, 4:9], labels[0, 10:, :5] = 2, IGNORED
    labels[1, :, 3:] = 3
    labels[2] = IGNORED
    return labels


def _classes(labels: Tensor) -> list[Tensor]:
    return [of_image[of_image != IGNORED].unique().long() for of_image in labels]


def _predictions(count: int = 3) -> list[QueryPredictions]:
    generator = torch.Generator().manual_seed(0)
    return [
        QueryPredictions(
            torch.randn(count, 6, 8, 8, generator=generator).requires_grad_(),
            torch.randn(count, 6, 5, generator=generator).requires_grad_(),
        )
        for _ in range(2)
    ]


def test_sums_equal_transformers_for_one_image() -> None:
    """Compares the means of one image with transformers' loss of this image, drawn from the same seed."""
    layers, labels, seed = _predictions(1), _labels()[:1], 7
    sums = MaskLoss(SETTINGS, CPU).sums(layers, labels, _classes(labels), [seed])
    counts = TermCounts.of(2, 6)
    theirs = mask2former_parts().Mask2FormerLoss(mask2former_config(SETTINGS), {})
    masks = torch.stack([labels[0] == 0, labels[0] == 2]).float()
    wanted = torch.zeros(3)
    torch.manual_seed(seed)
    for of in (layers[-1], *layers[:-1]):
        found = theirs(of.masks_BQHW, of.classes_BQX, [masks], [torch.tensor([0, 2])])
        wanted += torch.stack([found[f"loss_{name}"] for name in ("cross_entropy", "mask", "dice")])
    torch.testing.assert_close(sums / torch.tensor([counts.classes, counts.masks, counts.masks]), wanted)


def test_images_are_independent_of_each_other() -> None:
    layers, labels, seeds = _predictions(), _labels(), [5, 6, 7]
    loss = MaskLoss(SETTINGS, CPU)
    whole = loss.sums(layers, labels, _classes(labels), seeds)
    whole.sum().backward()
    gradients = [of.masks_BQHW.grad for of in layers]
    parts = torch.zeros(3)
    for place in (2, 0, 1):  # another order, and other draws before each
        own = [QueryPredictions(*(x[place : place + 1].detach() for x in of)) for of in layers]
        for of in own:
            of.masks_BQHW.requires_grad_()
        label = labels[place : place + 1]
        sums = loss.sums(own, label, _classes(label), seeds[place : place + 1])
        sums.sum().backward()
        for of, gradient in zip(own, gradients, strict=True):
            torch.testing.assert_close(of.masks_BQHW.grad, gradient[place : place + 1])
        parts += sums.detach()
    torch.testing.assert_close(parts, whole.detach())


def test_an_image_without_labels_only_teaches_that_there_is_nothing() -> None:
    sums = MaskLoss(SETTINGS, CPU).sums(_predictions(1), _labels()[2:], _classes(_labels()[2:]), [1])
    assert sums[0] > 0 and sums[1:].tolist() == [0, 0]
    assert TermCounts.of(0, 6) == (6, 0)


def test_no_images_give_zero_and_every_gradient() -> None:
    decoder = MaskDecoder(SETTINGS, 8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        value = decoder_initial_value(name, parameter.shape, SETTINGS.decoder, generator)
        parameter.data.copy_(torch.full_like(parameter, float(name.endswith("weight"))) if value is None else value)
    layers = decoder([torch.rand(0, 8, side, side) for side in (8, 4, 2, 1)])
    sums = MaskLoss(SETTINGS, CPU).sums(layers, _labels()[:0], [], [])
    sums.sum().backward()
    assert sums.tolist() == [0, 0, 0]
    assert all(p.grad is not None and not p.grad.any() for p in decoder.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_predictions_are_float32_for_each_layer(dtype: torch.dtype) -> None:
    decoder = MaskDecoder(SETTINGS, 8)
    torch.manual_seed(0)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    maps = [torch.rand(2, 8, side, side) for side in (8, 4, 2, 1)]
    expected = decoder(maps)
    layers = decoder.to(dtype)([of.to(dtype) for of in maps])
    assert len(layers) == 3
    for of, wanted in zip(layers, expected, strict=True):
        assert of.masks_BQHW.dtype == torch.float32 and of.masks_BQHW.shape == (2, 6, 8, 8)
        error = (of.classes_BQX - wanted.classes_BQX).square().mean().sqrt() / wanted.classes_BQX.std()
        assert error < 0.1
