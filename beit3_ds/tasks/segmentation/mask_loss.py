"""Computes the sums of Mask2Former's three loss terms, one image at a time."""

# B images, N target masks of one image, Q queries, C classes.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from beit3_ds.device_copy import copy_to_device
from beit3_ds.tasks.segmentation.config import SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import QueryPredictions, mask2former_config, mask2former_parts

NO_OBJECT_WEIGHT = 0.1
"""Weight of unmatched queries in the class term, as in Mask2Former. A query that is matched with a target mask has
weight 1."""
MATCHED_QUERY_UNITS = 10
"""Weight of a matched query in the sum `TermCounts.classes`. An unmatched query has weight 1, so its relative weight is
`NO_OBJECT_WEIGHT` (0.1), and all weights are integers."""


class TermCounts(NamedTuple):
    """Holds the denominators of an image's loss terms."""

    classes: int
    """Denominator of the class term: the sum of the weights of all queries. The weight is `MATCHED_QUERY_UNITS` (10)
    for a query that is matched with a target mask, and 1 for any other query."""
    masks: int
    """Denominator of the two mask terms: number of target masks that are matched with a query."""

    @classmethod
    def of(cls, num_masks: int, num_queries: int) -> "TermCounts":
        """Returns the denominators of the loss terms of one image.

        A query is matched with at most one target mask, so at most `num_queries` target masks are matched.

        Args:
            num_masks: number of target masks of the image.
            num_queries: number of queries.
        """
        matched = min(num_masks, num_queries)
        unmatched_weight = round(MATCHED_QUERY_UNITS * NO_OBJECT_WEIGHT)
        return cls(MATCHED_QUERY_UNITS * matched + unmatched_weight * (num_queries - matched), matched)


class MaskLoss:
    """Sums Mask2Former's loss terms: cross entropy of classes; binary cross entropy and dice loss of masks.

    An image has one target mask per class in the image. For the predictions of each layer, queries are matched with
    target masks, and masks are compared at random points (transformers' `Mask2FormerLoss`). The terms of an image
    depend only on the predictions, the labels and the seed of this image. The sum over a step is therefore independent
    of micro-batches and ranks.
    """

    def __init__(self, settings: SegmentationConfig, device: torch.device) -> None:
        """Builds transformers' Mask2Former loss on `device`; the loss has no parameters and one constant buffer."""
        config = mask2former_config(settings)
        self._loss: Any = mask2former_parts().Mask2FormerLoss(config, weight_dict={})
        self._loss.empty_weight = copy_to_device(self._loss.empty_weight, device)
        self._loss.matcher = _DeviceMatcher(self._loss.matcher, device)
        self._loss.get_num_masks = _one  # makes the mask losses sums instead of means
        self._settings = settings

    def sums(
        self, layers: Sequence[QueryPredictions], labels: Tensor, classes: Sequence[Tensor], seeds: Sequence[int]
    ) -> Tensor:
        """Returns the three terms (classes, masks, dice), each summed over all images and layers, (3,) float32.

        Args:
            layers: predictions of each layer. The number of images may be 0.
            labels: class of each pixel, (images, height, width) uint8, `config.IGNORED` where unknown.
            classes: classes in each image, ascending, (classes,) int64 each.
            seeds: seed of the random points of each image.
        """
        # Without images, the sums still depend on every parameter.
        nothing = torch.stack([(of.masks_BQHW.sum() + of.classes_BQX.sum()) * 0 for of in layers]).sum()
        sums = [nothing.expand(3)]
        for image, (classes_N, seed) in enumerate(zip(classes, seeds, strict=True)):
            own = [QueryPredictions(*(of[image : image + 1] for of in predictions)) for predictions in layers]
            sums.append(self._image_sums(own, labels[image], classes_N, seed))
        return torch.stack(sums).sum(0)

    def _image_sums(self, layers: Sequence[QueryPredictions], labels: Tensor, classes_N: Tensor, seed: int) -> Tensor:
        masks_NHW = (labels == classes_N[:, None, None]).float()
        weight = TermCounts.of(len(classes_N), self._settings.decoder.num_queries).classes
        devices = [labels.device] if labels.device.type == "cuda" else []
        sums = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for of in (layers[-1], *layers[:-1]):  # transformers' order, for equal random draws
                found = self._loss(of.masks_BQHW, of.classes_BQX, [masks_NHW], [classes_N])
                # transformers' cross entropy is a weighted mean over the queries of the image.
                sums.append(torch.stack([found["loss_cross_entropy"] * weight, found["loss_mask"], found["loss_dice"]]))
        return torch.stack(sums).sum(0)


class _DeviceMatcher(nn.Module):
    """Copies the indices of the matched queries and masks to the device through pinned memory.

    The matcher of transformers returns the indices in host memory. Without the copy, each use of an index on the device
    would make the host wait.
    """

    def __init__(self, matcher: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.matcher, self._device = matcher, device

    def forward(self, *arguments: Any) -> list[tuple[Tensor, ...]]:
        return [tuple(copy_to_device(x, self._device) for x in of_image) for of_image in self.matcher(*arguments)]


def _one(class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.ones((), device=device)
