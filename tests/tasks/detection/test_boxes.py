"""Boxes are converted and matched as torchvision does it, but without reading values back from a device."""

import pytest
import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou

from beit3_ds.tasks.detection.boxes import clip_boxes, decode_boxes, encode_boxes, match_boxes, pool_boxes

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def _boxes(count: int, seed: int = 0) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=draws) * 90
    return torch.cat([corners, corners + torch.rand(count, 2, generator=draws) * 40 + 1], 1)


def test_regression_targets_are_torchvisions() -> None:
    boxes, objects, deltas = _boxes(300), _boxes(300, 1), torch.randn(300, 4)
    assert torch.equal(decode_boxes(CODER, deltas, boxes), CODER.decode_single(deltas, boxes))
    assert torch.equal(encode_boxes(CODER, objects, boxes), CODER.encode_single(objects, boxes))
    assert decode_boxes(CODER, deltas[:0], boxes[:0]).shape == (0, 4)
    assert encode_boxes(CODER, objects[:0], boxes[:0]).shape == (0, 4)


@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize(("high", "low"), [(0.7, 0.3), (0.5, 0.5)])
def test_matches_are_torchvisions(high: float, low: float, keep_best: bool) -> None:
    boxes = _boxes(300)
    objects = torch.cat([_boxes(7, 1), boxes[:2], boxes[:1]])  # catches ties that are broken otherwise
    expected = Matcher(high, low, allow_low_quality_matches=keep_best)(box_iou(objects, boxes))
    assert torch.equal(match_boxes(boxes, objects, high, low, keep_best=keep_best), expected)
    assert (match_boxes(boxes, objects[:0], high, low) == -1).all()


def test_clipped_boxes_are_inside() -> None:
    clipped = clip_boxes(torch.tensor([[-5.0, 3, 80, 60], [1, 2, 3, 4]]), (50, 70))
    assert clipped.tolist() == [[0, 3, 70, 50], [1, 2, 3, 4]]


def test_pooled_features_are_those_of_each_box_alone() -> None:
    """Catches features that end up at another box after they were pooled level by level."""
    draws = torch.Generator().manual_seed(0)
    pyramid = {stride: torch.randn(2, 3, 256 // stride, 256 // stride, generator=draws) for stride in (4, 8, 16, 32)}
    sides = torch.tensor([200.0, 9, 70, 130, 20, 230])
    boxes = torch.stack([sides / 9, sides / 7, sides, sides + 5], 1)
    pooled = pool_boxes(pyramid, [boxes[:4], boxes[4:]], 7)
    nothing = boxes[:0]
    for place, box in enumerate(boxes):
        own = [box[None], nothing] if place < 4 else [nothing, box[None]]
        assert torch.equal(pooled[place], pool_boxes(pyramid, own, 7)[0])
    assert pool_boxes(pyramid, [nothing, nothing], 7).shape == (0, 3, 7, 7)
