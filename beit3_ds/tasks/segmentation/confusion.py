"""Counts pixels by true and predicted class, and computes the mean intersection over union."""

# C classes.

from dataclasses import dataclass

import torch
from torch import Tensor

from beit3_ds.tasks.segmentation.config import IGNORED


@dataclass(frozen=True)
class Confusion:
    """Counts pixels by true class and predicted class, as a confusion matrix."""

    counts_CC: Tensor
    """Number of pixels by true class (rows) and predicted class (columns), int64."""

    @classmethod
    def empty(cls, num_classes: int) -> "Confusion":
        """Returns a confusion matrix of zeros."""
        return cls(torch.zeros(num_classes, num_classes, dtype=torch.int64))

    @classmethod
    def of(cls, truth: Tensor, predicted: Tensor, num_classes: int) -> "Confusion":
        """Returns the confusion matrix of an image; pixels without a known class do not count.

        Args:
            truth: class of each pixel, uint8, `IGNORED` where unknown.
            predicted: predicted class of each pixel, uint8, with the shape of `truth`.
            num_classes: number of classes.
        """
        known = truth != IGNORED
        places = truth[known].long() * num_classes + predicted[known].long()
        return cls(places.bincount(minlength=num_classes**2).view(num_classes, num_classes).cpu())

    def __add__(self, other: "Confusion") -> "Confusion":
        """Returns the sum of two confusion matrices."""
        return Confusion(self.counts_CC + other.counts_CC)

    @property
    def pixels(self) -> Tensor:
        """Returns the number of pixels per true class, (classes,) int64."""
        return self.counts_CC.sum(1)

    def iou(self) -> Tensor:
        """Returns the intersection over union of each class, (classes,) float64.

        The value is NaN for a class that neither occurs nor is predicted.
        """
        intersection = self.counts_CC.diagonal().double()
        union = (self.pixels + self.counts_CC.sum(0) - self.counts_CC.diagonal()).double()
        return intersection / union

    def accuracy(self) -> Tensor:
        """Returns the share of each class's pixels that are predicted right, (classes,) float64.

        The value is NaN for a class that does not occur.
        """
        return self.counts_CC.diagonal().double() / self.pixels.double()

    def metrics(self) -> dict[str, float]:
        """Returns `mIoU`, `mean_accuracy` and `pixel_accuracy`; empty without labelled pixels.

        `mIoU` is the mean over classes that occur or are predicted, as in ADE20K's own evaluation. `mean_accuracy` is
        the mean over classes that occur.
        """
        total = int(self.counts_CC.sum())
        if not total:
            return {}
        return {
            "mIoU": self.iou().nanmean().item(),
            "mean_accuracy": self.accuracy().nanmean().item(),
            "pixel_accuracy": int(self.counts_CC.diagonal().sum()) / total,
        }
