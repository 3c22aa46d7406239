"""Selects the detections of images from scored boxes of one or several views per image."""

# N candidates or detections of one image, K classes, S side of a predicted mask.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.tasks.detection.boxes import clip_boxes, has_area
from beit3_ds.tasks.detection.suppression import Suppression
from beit3_ds.tasks.detection.views import View


class Detections(NamedTuple):
    """Holds the detections of one image, in descending order of the score."""

    boxes: Tensor
    """Left, top, right and bottom of each detection in pixels of the image, (N, 4) float32."""
    scores: Tensor
    """Score of each detection, from 0 to 1, (N,) float32."""
    labels: Tensor
    """Category label of each detection, (N,) int64."""
    masks: Tensor | None = None
    """Probability that each cell of the box belongs to the object, (N, side, side) float32; None in a task without
    masks."""


def choose_detections(
    views: Sequence[View], scored: Sequence[tuple[Tensor, Tensor]], suppression: Suppression
) -> list[Detections]:
    """Returns the detections of every sample of a batch, without masks.

    The boxes of all views of an image are mapped to the image and compete with each other.

    Args:
        views: views of the batch; the views of a sample are consecutive.
        scored: boxes, (N, 4), and class probabilities, (N, classes), of each view.
        suppression: suppresses overlapping boxes.
    """
    of_samples: list[list[Detections]] = []
    for view, (boxes_N4, scores_NK) in zip(views, scored, strict=True):
        if view.sample == len(of_samples):
            of_samples.append([])
        clipped = clip_boxes(view.to_image(boxes_N4), view.original)
        is_candidate_NK = (scores_NK > suppression.score_threshold) & has_area(clipped)[:, None]
        places, labels = is_candidate_NK.nonzero(as_tuple=True)
        of_samples[-1].append(Detections(clipped[places], scores_NK[places, labels], labels))
    return [_choose(candidates, suppression) for candidates in of_samples]


def _choose(of_views: Sequence[Detections], suppression: Suppression) -> Detections:
    boxes, scores, labels = (torch.cat([view[field] for view in of_views]) for field in range(3))  # type: ignore[misc]
    kept = suppression(boxes, scores, labels)
    return Detections(boxes[kept.indices], kept.scores, labels[kept.indices])
