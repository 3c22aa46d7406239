"""Counts pixels by class and prediction, and computes the mean intersection over union."""

# C classes.

from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_ds.tasks.segmentation.config import IGNORED


@dataclass(frozen=True)
class Confusion:
    """Holds the number of pixels of each class that were predicted as each class; sums of integers are exact."""

    counts_CC: Tensor
    """Number of pixels by class (rows) and predicted class (columns), int64."""

    @classmethod
    def empty(cls, num_classes: int) -> "Confusion":
        """Returns a matrix of zeros."""
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.int64))

    @classmethod
    def of(cls, truth: Tensor, predicted: Tensor, num_classes: int) -> "Confusion":
        """Counts the pixels of an image; pixels whose class is unknown do not count.

        Args:
            truth: class of each pixel, `IGNORED` where unknown, uint8.
            predicted: predicted class of each pixel, uint8, of the same shape.
            num_classes: number of classes.
        """
        known = truth != IGNORED
        places = truth[known].long() * num_classes + predicted[known].long()
        return cls(places.bincount(minlength=num_classes**2).view(num_classes, num_classes).cpu())

    def __add__(self, other: "Confusion") -> "Confusion":
        """Returns the sum of two matrices."""
        return Confusion(self.counts_CC + other.counts_CC)

    @property
    def pixels(self) -> Tensor:
        """Returns the number of pixels of each class, (C,) int64."""
        return self.counts_CC.sum(1)

    def iou(self) -> Tensor:
        """Returns the intersection over union of each class, (C,) float64; NaN if the class is nowhere."""
        intersection = self.counts_CC.diagonal().double()
        union = (self.pixels + self.counts_CC.sum(0) - self.counts_CC.diagonal()).double()
        return intersection / union

    def accuracy(self) -> Tensor:
        """Returns the share of each class's pixels with the right prediction, (C,) float64; NaN if it has none."""
        return self.counts_CC.diagonal().double() / self.pixels.double()

    def metrics(self) -> dict[str, float]:
        """Returns `mIoU`, `mean_accuracy` and `pixel_accuracy`; empty without labelled pixels.

        As in ADE20K's own evaluation, classes that neither occur nor are predicted do not count in the means.
        """
        total = int(self.counts_CC.sum())
        if not total:
            return {}
        return {
            "mIoU": self.iou().nanmean().item(),
            "mean_accuracy": self.accuracy().nanmean().item(),
            "pixel_accuracy": int(self.counts_CC.diagonal().sum()) / total,
        }
