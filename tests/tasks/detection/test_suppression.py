"""Tests that Soft-NMS equals a loop over each class as in the paper, and equals plain NMS in the limits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from beit3_ds.tasks.detection.suppression import Suppression, SuppressionMethod

SIDE = 8


def paper_loop(
    boxes: Tensor, scores: Tensor, method: SuppressionMethod, iou: float, sigma: float, threshold: float
) -> list[tuple[int, float]]:
    """Runs the loop in figure 2 of arXiv:1704.04503 on the boxes of one class, and drops boxes with low scores."""
    overlaps = box_iou(boxes, boxes).tolist()
    left = {index: score for index, score in enumerate(scores.tolist()) if score > threshold}
    kept = []
    while left:
        best = max(left, key=lambda index: (left[index], -index))
        kept.append((best, left.pop(best)))
        for index in list(left):
            overlap = overlaps[best][index]
            if method == "gaussian":
                left[index] *= math.exp(-(overlap**2) / sigma)
            elif method == "linear" and overlap >= iou:
                left[index] *= 1 - overlap
            elif method == "hard" and overlap > iou:
                left[index] = 0.0
            if left[index] <= threshold:
                del left[index]
    return kept


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Generates boxes on a coarse grid that overlap, coincide or touch, with distinct scores, and their labels."""
    count = draw(st.integers(0, 12))
    coordinates = st.tuples(*[st.integers(0, SIDE - 2)] * 2, *[st.integers(1, SIDE)] * 2)
    corners = [(x, y, x + w, y + h) for x, y, w, h in draw(st.lists(coordinates, min_size=count, max_size=count))]
    hundredths = draw(st.lists(st.integers(1, 100), min_size=count, max_size=count, unique=True))
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 4)
    return boxes, torch.tensor(hundredths, dtype=torch.float64) / 100, torch.tensor(labels, dtype=torch.int64)


@settings(max_examples=150, deadline=None)
@given(
    problems(),
    st.sampled_from(["linear", "gaussian", "hard"]),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.sampled_from([0.1, 0.5, 2.0]),
    st.sampled_from([0.0, 0.05, 0.25]),
    st.integers(1, 14),
)
def test_it_equals_the_papers_loop(
    problem: tuple[Tensor, Tensor, Tensor],
    method: SuppressionMethod,
    iou: float,
    sigma: float,
    threshold: float,
    most: int,
) -> None:
    boxes, scores, labels = problem
    suppress = Suppression(method=method, iou=iou, sigma=sigma, score_threshold=threshold, max_boxes=most)
    found = suppress(boxes, scores, labels)
    expected = []
    for label in labels.unique().tolist():
        own = (labels == label).nonzero()[:, 0]
        kept = paper_loop(boxes[own], scores[own], method, iou, sigma, threshold)
        expected += [(int(own[index]), score) for index, score in kept]
    expected.sort(key=lambda pair: -pair[1])
    values = torch.tensor([score for _, score in expected][:most], dtype=torch.float64)
    torch.testing.assert_close(found.scores, values, rtol=1e-12, atol=0)
    by_index = dict(expected)  # boxes whose scores have become equal may change places; each keeps its own score
    for index, score in zip(found.indices.tolist(), found.scores.tolist(), strict=True):
        assert by_index[index] == pytest.approx(score, rel=1e-12)
    assert len(set(found.indices.tolist())) == len(found.indices)


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([0.35, 0.55]))
def test_hard_suppression_equals_torchvisions(problem: tuple[Tensor, Tensor, Tensor], iou: float) -> None:
    boxes, scores, labels = problem
    found = Suppression(method="hard", iou=iou, sigma=1.0, score_threshold=0.0, max_boxes=99)(boxes, scores, labels)
    assert found.indices.tolist() == batched_nms(boxes, scores, labels, iou).tolist()


@settings(max_examples=100, deadline=None)
@given(problems())
def test_soft_suppression_is_plain_nms_in_its_limits(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """Checks two limits in which Soft-NMS is plain NMS.

    A Gaussian of width 0 removes every overlapping box. So does `linear` if the remaining scores are below the
    threshold.
    """
    boxes, scores, labels = problem
    scores = 0.9 - scores * 1e-6
    options = {"sigma": 1e-9, "max_boxes": 99}
    narrow = Suppression(method="gaussian", iou=0.5, score_threshold=1e-9, **options)(boxes, scores, labels)
    every = Suppression(method="hard", iou=0.0, score_threshold=1e-9, **options)(boxes, scores, labels)
    assert narrow.indices.tolist() == every.indices.tolist()
    iou = 0.2**0.5  # no overlap of boxes with whole corners is equal to it, where the two methods differ
    linear = Suppression(method="linear", iou=iou, score_threshold=0.9 * (1 - iou), **options)(boxes, scores, labels)
    hard = Suppression(method="hard", iou=iou, score_threshold=0.9 * (1 - iou), **options)(boxes, scores, labels)
    assert linear.indices.tolist() == hard.indices.tolist()
