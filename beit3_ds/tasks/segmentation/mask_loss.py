"""Computes the sums of Mask2Former's three loss terms, image by image."""

# B images, N target masks of one image, Q queries, C classes.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.tasks.segmentation.config import IGNORED, SegmentationConfig
from beit3_ds.tasks.segmentation.mask_decoder import QueryPredictions, mask2former_config, mask2former_parts

NO_OBJECT_WEIGHT = 0.1
"""Weight of queries without a target mask in the mean of the class terms (Mask2Former's value)."""
QUERY_UNITS = 10
"""Units in which `TermCounts.classes` counts a query with a target mask; one without counts 10 * `NO_OBJECT_WEIGHT`."""


class TermCounts(NamedTuple):
    """Holds the number over which each term of an image is summed, in the order of the task's terms."""

    classes: int
    """Weights of all queries, in units of 1 / `QUERY_UNITS`."""
    masks: int
    """Number of target masks."""

    @classmethod
    def of(cls, num_masks: int, num_queries: int) -> "TermCounts":
        """Returns the counts of an image with `num_masks` target masks; further ones than queries match none."""
        matched = min(num_masks, num_queries)
        unmatched_weight = round(QUERY_UNITS * NO_OBJECT_WEIGHT)
        return cls(QUERY_UNITS * matched + unmatched_weight * (num_queries - matched), matched)


class MaskLoss:
    """Sums cross entropies of classes, and binary cross entropies and dice losses of masks (transformers' loss).

    An image's predictions of each layer are matched with its target masks, one per class in the image, and compared at
    drawn points. Everything of an image depends on its own predictions and seed alone, so sums over images do not
    depend on how ranks and micro-batches cut a step.
    """

    def __init__(self, settings: SegmentationConfig, device: torch.device) -> None:
        """Builds transformers' loss; it has no parameters, and its one buffer is a constant."""
        config = mask2former_config(settings)
        self._loss: Any = mask2former_parts().Mask2FormerLoss(config, weight_dict={}).to(device)
        self._loss.get_num_masks = _one  # so that its masks' losses are sums
        self._settings = settings

    def sums(self, layers: Sequence[QueryPredictions], labels: Tensor, seeds: Tensor) -> Tensor:
        """Returns the sums of the terms classes, masks and dice over all images and layers, (3,) float32.

        Args:
            layers: predictions of each layer; there may be no images.
            labels: class of each pixel, `IGNORED` where unknown, (B, height, width) uint8.
            seeds: seed of the drawn points of each image, (B,) int64.
        """
        # Without images, the sums still depend on every parameter.
        nothing = torch.stack([(of.masks_BQHW.sum() + of.classes_BQX.sum()) * 0 for of in layers]).sum()
        sums = [nothing.expand(3)]
        for image, seed in enumerate(seeds.tolist()):
            own = [QueryPredictions(*(of[image : image + 1] for of in predictions)) for predictions in layers]
            sums.append(self._image_sums(own, labels[image], seed))
        return torch.stack(sums).sum(0)

    def _image_sums(self, layers: Sequence[QueryPredictions], labels: Tensor, seed: int) -> Tensor:
        classes_N = labels.unique()
        classes_N = classes_N[classes_N != IGNORED].long()
        masks_NHW = (labels == classes_N[:, None, None]).float()
        weight = TermCounts.of(len(classes_N), self._settings.decoder.num_queries).classes
        devices = [labels.device] if labels.device.type == "cuda" else []
        sums = []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for of in (layers[-1], *layers[:-1]):  # transformers' order, so that the draws are the same
                found = self._loss(of.masks_BQHW, of.classes_BQX, [masks_NHW], [classes_N])
                # Its cross entropy is a mean over the weights of the image's queries.
                sums.append(torch.stack([found["loss_cross_entropy"] * weight, found["loss_mask"], found["loss_dice"]]))
        return torch.stack(sums).sum(0)


def _one(class_labels: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.ones((), device=device)
