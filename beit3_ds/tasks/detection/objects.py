"""Defines the objects of images as tensors in a packed batch, and takes them apart again."""

# I images, N objects of all images, M side of a stored mask.

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.tasks.detection.box_masks import MASK_SIDE

BOXES = "boxes"
"""Key in `PackedBatch.targets` of the box of each object, in pixels of the model's input, (objects, 4) float32."""
LABELS = "labels"
"""Key of the label of each object, (objects,) int64."""
MASKS = "masks"
"""Key of the mask of each object inside its box, in `MASK_SIDE` x `MASK_SIDE` cells, (objects, cells, cells) uint8."""
COUNTS = "object counts"
"""Key of the number of objects of each image, (images,) int64."""
SIZES = "image sizes"
"""Key of the height and width in pixels of each image in the model's input, without padding, (images, 2) int64."""
SEEDS = "seeds"
"""Key of the seed of each image's draws in the head (`sampling.draw_seed`), (images,) int64."""


class ImageObjects(NamedTuple):
    """Holds the objects of one image."""

    boxes: Tensor
    """Left, top, right and bottom of each object, in pixels of the model's input, (objects, 4) float32."""
    labels: Tensor
    """Label of each object, (objects,) int64."""
    masks: Tensor
    """Mask of each object inside its box, (objects, MASK_SIDE, MASK_SIDE) uint8; no rows in a task without masks."""


def empty_objects() -> ImageObjects:
    """Returns the objects of an image that has none."""
    masks = torch.empty(0, MASK_SIDE, MASK_SIDE, dtype=torch.uint8)
    return ImageObjects(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), masks)


def pack_objects(objects: Sequence[ImageObjects]) -> dict[str, Tensor]:
    """Returns the targets `BOXES`, `LABELS`, `MASKS` and `COUNTS` of the images of a batch."""
    parts = [empty_objects(), *objects]
    counts = [len(of_image.labels) for of_image in objects]
    return {
        BOXES: torch.cat([of_image.boxes for of_image in parts]),
        LABELS: torch.cat([of_image.labels for of_image in parts]),
        MASKS: torch.cat([of_image.masks for of_image in parts]),
        COUNTS: torch.tensor(counts, dtype=torch.int64),
    }


def unpack_objects(targets: Mapping[str, Tensor]) -> list[ImageObjects]:
    """Returns the objects of each image of a batch; waits for the device, as the choice of proposals does too."""
    counts = targets[COUNTS].tolist()
    boxes, labels = targets[BOXES].split(counts), targets[LABELS].split(counts)
    has_masks = len(targets[MASKS]) == len(targets[LABELS])
    masks = targets[MASKS].split(counts) if has_masks else [targets[MASKS]] * len(counts)
    return [ImageObjects(*of_image) for of_image in zip(boxes, labels, masks, strict=True)]
