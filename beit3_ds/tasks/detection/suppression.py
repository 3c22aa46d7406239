"""Suppresses boxes that overlap better-scored boxes: Soft-NMS (Bodla et al., 2017, arXiv:1704.04503) and plain NMS."""

# N boxes, n kept boxes.

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

SuppressionMethod = Literal["linear", "gaussian", "hard"]
"""Method of suppressing a box that overlaps a better-scored box of its class (`Suppression.method`)."""


class KeptBoxes(NamedTuple):
    """Holds the boxes that remain after suppression, in descending order of the score."""

    indices: Tensor
    """Index of each kept box in the list of given boxes, (n,) int64."""
    scores: Tensor
    """Score of each kept box, as lowered by the suppression, (n,), descending."""


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Suppresses overlapping boxes of an image, separately for each class."""

    method: SuppressionMethod
    """Effect on a box whose IoU with a better-scored box of the same class is u. `linear` multiplies the score by 1 - u
    if u is at least `iou`. `gaussian` multiplies the score by exp(-u^2 / `sigma`). `hard` removes the box if u exceeds
    `iou`."""
    iou: float
    """Minimum IoU for suppression by `linear` and `hard`."""
    sigma: float
    """Sigma of `gaussian`."""
    score_threshold: float
    """A box is removed when its score is not above this value."""
    max_boxes: int
    """Maximum number of kept boxes."""

    def __call__(self, boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor) -> KeptBoxes:
        """Returns the kept boxes; of boxes with equal scores, the box with the smaller index comes first.

        Each iteration keeps the box with the best remaining score of all classes, and then applies `method` to the
        other boxes of the same class. Classes do not influence each other. Suppressing the boxes of each class
        separately, and then keeping the best `max_boxes` boxes in total, would give the same result.

        Args:
            boxes_N4: left, top, right and bottom of each box, (N, 4).
            scores_N: score of each box, (N,).
            labels_N: category label of each box, (N,).
        """
        left_N = torch.where(scores_N > self.score_threshold, scores_N, 0.0)
        places_N = torch.arange(len(scores_N), device=scores_N.device)
        indices, scores = [], []
        for _ in range(min(self.max_boxes, len(scores_N))):
            best = left_N.max()
            index = torch.where(left_N == best, places_N, len(places_N)).min()
            indices.append(index)
            scores.append(best)
            factor_N = self._factor(box_iou(boxes_N4[index][None], boxes_N4)[0])
            left_N = torch.where(labels_N == labels_N[index], left_N * factor_N, left_N)
            left_N = torch.where((places_N == index) | (left_N <= self.score_threshold), 0.0, left_N)
        if not indices:
            return KeptBoxes(places_N, scores_N)
        kept = torch.stack(scores) > self.score_threshold
        return KeptBoxes(torch.stack(indices)[kept], torch.stack(scores)[kept])

    def _factor(self, iou_N: Tensor) -> Tensor:
        match self.method:
            case "linear":
                return torch.where(iou_N >= self.iou, 1 - iou_N, 1.0)
            case "gaussian":
                return torch.exp(-(iou_N**2) / self.sigma)
            case _:
                return torch.where(iou_N > self.iou, 0.0, 1.0)
