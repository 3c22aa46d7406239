"""Augments an image with its objects by large-scale jitter and flips (Ghiasi et al., 2021, arXiv:2012.07177)."""

# N objects, M side of a stored mask.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_ds.data.images.augmentation import draw_colors, image_pixels
from beit3_ds.pixels import to_floats
from beit3_ds.tasks.detection.box_masks import tight_box
from beit3_ds.tasks.detection.files import StoredObject
from beit3_ds.tasks.detection.objects import ImageObjects, empty_objects
from beit3_ds.tasks.detection.segmentations import draw_in_box
from beit3_ds.tasks.detection.views import Size

_CUT_TOLERANCE = 1e-3  # pixels by which a crop must cut a box before its mask decides on the box


class Window(NamedTuple):
    """Describes the part of an image that becomes a view, and the view's size."""

    left: float
    """First column, in pixels of the image."""
    top: float
    """First row."""
    right: float
    """Column after the last one."""
    bottom: float
    """Row after the last one."""
    size: Size
    """Height and width of the view in pixels."""
    is_flipped: bool = False
    """Whether the view is flipped from left to right."""

    def cut(self, image: Image.Image) -> Tensor:
        """Returns the view, (3, height, width) uint8; the resize is bilinear with antialiasing."""
        height, width = self.size
        pixels = image_pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=self[:4]))
        return pixels.flip(-1) if self.is_flipped else pixels

    def clip(self, boxes_N4: Tensor) -> Tensor:
        """Returns the parts of boxes inside the window, in pixels of the image."""
        low, high = boxes_N4.new_tensor(self[:2] * 2), boxes_N4.new_tensor(self[2:4] * 2)
        return boxes_N4.clamp(low, high)

    def to_view(self, boxes_N4: Tensor) -> Tensor:
        """Returns boxes of the image in pixels of the view."""
        height, width = self.size
        x, y = width / (self.right - self.left), height / (self.bottom - self.top)
        moved = (boxes_N4 - boxes_N4.new_tensor(self[:2] * 2)) * boxes_N4.new_tensor((x, y, x, y))
        if not self.is_flipped:
            return moved
        left, top, right, bottom = moved.unbind(1)
        return torch.stack([width - right, top, width - left, bottom], 1)


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """Resizes an image by a random factor, takes a crop of at most a fixed size, flips it and jitters its colors.

    The image is resized to fit into a square of `image_size` times the factor. Detectron2 pads small results to the
    square; here they stay small, and a batch holds images of different sizes.
    """

    image_size: int
    """Largest side of a view in pixels."""
    min_scale: float
    """Smallest factor."""
    max_scale: float
    """Largest factor."""
    flip_probability: float
    """Probability of a flip from left to right."""
    color_jitter: float
    """Strength of brightness, contrast and saturation jitter."""
    with_masks: bool
    """Whether objects have masks."""

    def draw(self, size: Size, rng: np.random.Generator) -> Window:
        """Draws the window of an image of a given height and width."""
        factor = self.image_size * rng.uniform(self.min_scale, self.max_scale) / max(size)
        sides = []
        for side in size:
            resized = max(1, round(side * factor))
            kept = min(resized, self.image_size)
            start = int(rng.integers(resized - kept + 1))
            sides.append((side * start / resized, side * (start + kept) / resized, kept))
        (top, bottom, height), (left, right, width) = sides
        is_flipped = bool(rng.random() < self.flip_probability)
        return Window(left, top, right, bottom, (height, width), is_flipped)

    def __call__(
        self, image: Image.Image, objects: Sequence[StoredObject], rng: np.random.Generator
    ) -> tuple[Tensor, ImageObjects]:
        """Returns a view of an RGB image, (3, height, width) float32 in [-1, 1], with the objects that it shows.

        Raises:
            ValueError: if the mask of an object is damaged.
        """
        window = self.draw(image.size[::-1], rng)
        pixels = window.cut(image)
        colors = draw_colors(pixels, self.color_jitter, rng)[None] if self.color_jitter else None
        return to_floats(pixels[None], colors)[0], visible_objects(
            objects, image.size[::-1], window, with_masks=self.with_masks
        )


def visible_objects(objects: Sequence[StoredObject], size: Size, window: Window, *, with_masks: bool) -> ImageObjects:
    """Returns the objects that a window shows; an object that it cuts gets the box of the visible part of its mask.

    Args:
        objects: objects of the image.
        size: height and width of the image.
        window: the window.
        with_masks: whether objects have masks.

    Raises:
        ValueError: if the mask of an object is damaged.
    """
    boxes, labels, masks = [], [], []
    for found in objects:
        box = window.clip(found.box[None])[0]
        if not bool((box[2:] > box[:2]).all()):
            continue
        if with_masks:
            assert found.segmentation is not None, "every object has a mask"
            mask = draw_in_box(found.segmentation, size, box)
            if not mask.any():
                continue
            if (box - found.box).abs().max() > _CUT_TOLERANCE:
                box = tight_box(mask, box)
                mask = draw_in_box(found.segmentation, size, box)
            masks.append(mask.flip(-1) if window.is_flipped else mask)
        boxes.append(box)
        labels.append(found.label)
    if not boxes:
        return empty_objects()
    stored = torch.stack(masks).to(torch.uint8) if masks else empty_objects().masks
    return ImageObjects(window.to_view(torch.stack(boxes)), torch.tensor(labels, dtype=torch.int64), stored)


def fitted_window(size: Size, side: int, *, is_flipped: bool) -> Window:
    """Returns the window of a whole image that is resized to fit into a square, for evaluation.

    Args:
        size: height and width of the image.
        side: pixels on a side of the square.
        is_flipped: whether to flip the view from left to right.
    """
    height, width = size
    factor = side / max(size)
    return Window(0, 0, width, height, (max(1, round(height * factor)), max(1, round(width * factor))), is_flipped)
