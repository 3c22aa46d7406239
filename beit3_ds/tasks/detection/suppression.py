"""Suppresses boxes that overlap better ones: Soft-NMS (Bodla et al., 2017, arXiv:1704.04503) and plain NMS."""

# N boxes, n kept boxes.

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import box_iou

SuppressionMethod = Literal["linear", "gaussian", "hard"]
"""How the score of a box falls that overlaps a better box of its class (`Suppression.method`)."""


class KeptBoxes(NamedTuple):
    """Holds the boxes that are left after suppression, best first."""

    indices: Tensor
    """Index of each kept box among the given ones, (n,) int64."""
    scores: Tensor
    """Score of each kept box after suppression, (n,), descending."""


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Chooses the boxes of an image, class by class."""

    method: SuppressionMethod
    """How a better box of the same class with overlap u changes a score. `linear` multiplies it by 1 - u if u is at
    least `iou`, `gaussian` multiplies it by exp(-u^2 / `sigma`), and `hard` removes the box if u exceeds `iou`."""
    iou: float
    """Overlap from which `linear` and `hard` suppress."""
    sigma: float
    """Variance of `gaussian`."""
    score_threshold: float
    """A box is kept only while its score is above this value."""
    max_boxes: int
    """Largest number of kept boxes."""

    def __call__(self, boxes_N4: Tensor, scores_N: Tensor, labels_N: Tensor) -> KeptBoxes:
        """Returns the kept boxes; of equal scores, the box with the smaller index comes first.

        The best box of all classes is taken first, again and again. Boxes of different classes do not change each
        other, so this is the paper's loop for every class, cut off after the best `max_boxes` boxes.

        Args:
            boxes_N4: left, top, right and bottom of each box.
            scores_N: score of each box.
            labels_N: label of each box.
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
