"""Tests that masks drawn inside boxes equal COCO's masks, and that invalid ones are refused with a reason."""

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as coco_masks
from torch import Tensor

from beit3_ds.sample_data.object_scenes import run_lengths
from beit3_ds.tasks.detection.box_masks import MASK_SIDE, masks_in_boxes, tight_box
from beit3_ds.tasks.detection.segmentations import (
    Segmentation,
    draw_in_box,
    parse_segmentation,
    whole_segmentation,
)

SIZE = (120, 160)
TRIANGLE = [[20.0, 100.0, 130.0, 90.5, 70.25, 10.0]]
TWO_PARTS = [[10.0, 10.0, 60.0, 10.0, 60.0, 50.0, 10.0, 50.0], [80.0, 60.0, 150.0, 60.0, 150.0, 115.0, 80.0, 115.0]]


def _iou(left: Tensor, right: Tensor) -> float:
    return float((left & right).sum() / (left | right).sum())


@pytest.mark.parametrize("polygons", [TRIANGLE, TWO_PARTS])
@pytest.mark.parametrize("box", [(10.0, 10.0, 150.0, 115.0), (40.0, 30.0, 100.0, 70.0), (-20.0, -10.0, 180.0, 140.0)])
def test_polygons_are_drawn_as_in_the_whole_image(polygons: list[list[float]], box: tuple[float, ...]) -> None:
    found = parse_segmentation(polygons, SIZE)
    assert found is not None and Segmentation.decode(found.encode())[1] == b""
    box_4 = torch.tensor(box)
    whole = torch.from_numpy(whole_segmentation(found, SIZE))
    official = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, *SIZE))).astype(bool)
    assert np.array_equal(whole, official)
    frame = torch.tensor([[0.0, 0.0, SIZE[1], SIZE[0]]])
    expected = masks_in_boxes(whole[None], frame, box_4[None], MASK_SIDE)[0]
    assert _iou(draw_in_box(Segmentation.decode(found.encode()), SIZE, box_4), expected) > 0.97


def test_run_lengths_are_read_plain_and_compressed() -> None:
    found = parse_segmentation(TWO_PARTS, SIZE)
    assert found is not None
    whole = whole_segmentation(found, SIZE)
    plain = {"size": list(SIZE), "counts": run_lengths(whole)}
    compressed = coco_masks.encode(np.asfortranarray(whole.astype(np.uint8)))
    written = {"size": list(SIZE), "counts": compressed["counts"].decode()}
    box = torch.tensor([5.0, 5.0, 155.0, 118.0])
    drawn = draw_in_box(found, SIZE, box)
    for value in (plain, written):
        other = parse_segmentation(value, SIZE)
        assert other is not None and np.array_equal(whole_segmentation(other, SIZE), whole)
        assert _iou(draw_in_box(Segmentation.decode(other.encode()), SIZE, box), drawn) > 0.97


def test_a_huge_polygon_in_a_tiny_box_takes_no_time() -> None:
    found = parse_segmentation([[-1e6, -1e6, 1e6, -1e6, 1e6, 1e6]], SIZE)
    assert found is not None
    drawn = draw_in_box(found, SIZE, torch.tensor([3.0, 3.0, 3.1, 3.1]))  # on the diagonal
    assert 0.45 < drawn.float().mean() < 0.55
    assert not draw_in_box(found, SIZE, torch.tensor([3.0, 50.0, 4.0, 51.0])).any()


def test_the_tight_box_is_that_of_the_visible_part() -> None:
    mask = torch.zeros(MASK_SIDE, MASK_SIDE, dtype=torch.bool)
    mask[28:56, 14:112] = True
    box = tight_box(mask, torch.tensor([100.0, 200.0, 212.0, 424.0]))
    assert box.tolist() == [114.0, 256.0, 212.0, 312.0]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "neither a list of polygons nor run lengths"),
        ([[1.0, 2.0, 3.0]], "no list of x and y"),
        ([[1.0, 2.0, float("nan"), 4.0, 5.0, 6.0]], "no pixels"),
        ({"size": [160, 120], "counts": [19200]}, r"its image \[120, 160\]"),
        ({"size": [120, 160], "counts": [5, 6]}, "add up to 11"),
        ({"size": [120, 160], "counts": "zzzzzzz"}, "no run lengths"),
        ({"size": [120, 160], "counts": "5:"}, "add up to 15"),
        ({"size": [120, 160], "counts": "5Z"}, "cut off"),
        ({"size": [120, 160], "counts": "O"}, "negative"),
        ({"size": [120, 160], "counts": ""}, "add up to 0"),
        ({"size": [120, 160], "counts": [1, -1, 19200]}, "no run lengths"),
    ],
)
def test_bad_segmentations_are_refused(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_segmentation(value, SIZE)


def test_polygons_without_three_corners_are_left_out() -> None:
    assert parse_segmentation([], SIZE) is None
    assert parse_segmentation([[1.0, 2.0, 3.0, 4.0]], SIZE) is None
    found = parse_segmentation([[1.0, 2.0, 3.0, 4.0], *TRIANGLE], SIZE)
    assert found is not None and len(found.rings) == 1
