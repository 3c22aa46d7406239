"""Tests the box stages of detection with boxes that a stage cannot use."""

import torch

from beit3_ds.tasks.detection.box_masks import MASK_SIDE
from beit3_ds.tasks.detection.cascade import Cascade, SampledBoxes
from beit3_ds.tasks.detection.objects import ImageObjects

BOXES = torch.tensor([[4.0, 4, 30, 40], [20, 10, 60, 50]])
SIZES = [(64, 64)]


def _cascade() -> Cascade:
    cascade = Cascade(4, 8, 2)
    draws = torch.Generator().manual_seed(0)
    for parameter in cascade.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, draws)
    return cascade


def _pyramid() -> dict[int, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    return {stride: torch.randn(1, 4, 64 // stride, 64 // stride, generator=draws) for stride in (4, 8, 16, 32)}


def _class_loss(cascade: Cascade) -> torch.Tensor:
    objects = ImageObjects(BOXES[:1], torch.tensor([1]), torch.ones(1, MASK_SIDE, MASK_SIDE, dtype=torch.uint8))
    sampled = SampledBoxes(BOXES, torch.tensor([0, -1]), 1)
    return cascade.losses(_pyramid(), [sampled], [objects], SIZES, 1)[0]


def test_refined_boxes_that_are_nan_become_empty() -> None:
    """Catches a NaN box, which has no pyramid level and would make RoIAlign read outside the features."""
    cascade = _cascade()
    cascade.stages[0].deltas.bias.data.fill_(torch.nan)
    boxes, scores = cascade.predict(_pyramid(), [BOXES], SIZES)[0]
    assert not boxes.any() and scores.isfinite().all()


def test_refined_boxes_without_area_do_not_count() -> None:
    """Catches class losses of the later stages when the first stage leaves only empty boxes."""
    cascade = _cascade()
    cascade.stages[0].deltas.bias.data.fill_(torch.nan)
    first = _class_loss(cascade)
    for stage in list(cascade.stages)[1:]:
        stage.classes.bias.data.add_(torch.tensor([9.0, -9, 5]))
    assert first > 0 and torch.equal(first, _class_loss(cascade))
