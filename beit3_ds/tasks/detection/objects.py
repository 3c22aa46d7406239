"""Packs the objects of images as tensors of a micro-batch, and unpacks them."""

# I images, N objects of all images, M side of a stored mask.

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.tasks.detection.box_masks import MASK_SIDE

BOXES = "boxes"
"""Key in `PackedBatch.targets`: box of each object in pixels of the model's input, (objects, 4) float32."""
LABELS = "labels"
"""Key in `PackedBatch.targets`: category label of each object, (objects,) int64."""
MASKS = "masks"
"""Key in `PackedBatch.targets`: mask of each object inside its box, (objects, `MASK_SIDE`, `MASK_SIDE`) uint8."""
COUNTS = "object counts"
"""Key in `PackedBatch.host_targets`: number of objects of each image, (images,) int64."""
SIZES = "image sizes"
"""Key in `PackedBatch.host_targets`: height and width of each input image without padding, in pixels, (images, 2)
int64."""
SEEDS = "seeds"
"""Key in `PackedBatch.targets`: seed for sampling anchors and proposals of each image (`draw_seed`), (images,) int64.
"""


class ImageObjects(NamedTuple):
    """Holds the objects of one image."""

    boxes: Tensor
    """Left, top, right and bottom of each object, in pixels of the model's input, (objects, 4) float32."""
    labels: Tensor
    """Category label of each object, (objects,) int64."""
    masks: Tensor
    """Mask of each object inside its box, (objects, MASK_SIDE, MASK_SIDE) uint8; (0, MASK_SIDE, MASK_SIDE) in a task
    without masks."""


def empty_objects() -> ImageObjects:
    """Returns an `ImageObjects` without any objects."""
    masks = torch.empty(0, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
    return ImageObjects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), masks)


def pack_objects(objects: Sequence[ImageObjects]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns two dicts for a batch: targets (`BOXES`, `LABELS` and `MASKS`) and host targets (`COUNTS`).

    The dicts are for `PackedBatch.targets` and `PackedBatch.host_targets`.
    """
    parts = [empty_objects(), *objects]
    counts = [len(of_image.labels) for of_image in objects]
    targets = {
        BOXES: torch.cat([of_image.boxes for of_image in parts]),
        LABELS: torch.cat([of_image.labels for of_image in parts]),
        MASKS: torch.cat([of_image.masks for of_image in parts]),
    }
    return targets, {COUNTS: torch.tensor(counts, dtype=torch.int64)}


def unpack_objects(targets: Mapping[str, Tensor], host_targets: Mapping[str, Tensor]) -> list[ImageObjects]:
    """Returns the objects of each image of a batch."""
    counts = host_targets[COUNTS].tolist()
    boxes, labels = targets[BOXES].split(counts), targets[LABELS].split(counts)
    has_masks = len(targets[MASKS]) == len(targets[LABELS])
    masks = targets[MASKS].split(counts) if has_masks else [targets[MASKS]] * len(counts)
    return [ImageObjects(*of_image) for of_image in zip(boxes, labels, masks, strict=True)]
