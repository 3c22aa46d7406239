"""Converts boxes between an image and its views, which may be scaled and flipped."""

# V views, N boxes, S side of a mask.

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

Size = tuple[int, int]
"""Height and width of an image in pixels, without padding."""

SAMPLES = "samples"
"""Key in `PackedBatch.host_targets`: for each view, the index of its sample in the batch, ascending, (views,) int64."""
INDICES = "indices"
"""Key in `PackedBatch.host_targets`: index of each sample in its split, (samples,) int64."""
ORIGINAL_SIZES = "original sizes"
"""Key in `PackedBatch.host_targets`: height and width in pixels of each view's image before scaling, (views, 2)
int64."""
FLIPS = "flips"
"""Key in `PackedBatch.host_targets`: whether each view is flipped horizontally, (views,) bool."""


class View(NamedTuple):
    """Holds the size and the flip of one view of an image."""

    sample: int
    """Index of the image in the batch."""
    size: Size
    """Height and width of the view in pixels, without padding."""
    original: Size
    """Height and width of the original image in pixels."""
    is_flipped: bool
    """Whether the view is flipped horizontally."""

    def to_image(self, boxes_N4: Tensor) -> Tensor:
        """Converts boxes from pixels of the view to pixels of the image, (N, 4)."""
        return self._scale(self._flip(boxes_N4, self.size[1]), self.original, self.size)

    def from_image(self, boxes_N4: Tensor) -> Tensor:
        """Converts boxes from pixels of the image to pixels of the view, (N, 4)."""
        return self._flip(self._scale(boxes_N4, self.size, self.original), self.size[1])

    def mask_to_image(self, masks_NSS: Tensor) -> Tensor:
        """Converts masks inside boxes, (N, side, side), from the view to the image: undoes a flip."""
        return masks_NSS.flip(-1) if self.is_flipped else masks_NSS

    def _flip(self, boxes_N4: Tensor, width: int) -> Tensor:
        if not self.is_flipped:
            return boxes_N4
        left, top, right, bottom = boxes_N4.unbind(1)
        return torch.stack([width - right, top, width - left, bottom], 1)

    @staticmethod
    def _scale(boxes_N4: Tensor, to: Size, of: Size) -> Tensor:
        y, x = to[0] / of[0], to[1] / of[1]
        factors = (x, y, x, y)
        return torch.stack([boxes_N4[:, i] * factor for i, factor in enumerate(factors)], 1)


def read_views(targets: Mapping[str, Tensor], sizes: list[Size]) -> list[View]:
    """Returns the views of a batch from its targets.

    Args:
        targets: `PackedBatch.host_targets` of an evaluation batch.
        sizes: height and width of each view in pixels.
    """
    samples, originals, flips = (targets[name].tolist() for name in (SAMPLES, ORIGINAL_SIZES, FLIPS))
    return [
        View(sample, size, (original[0], original[1]), is_flipped)
        for sample, size, original, is_flipped in zip(samples, sizes, originals, flips, strict=True)
    ]
