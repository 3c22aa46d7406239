"""Augments images and their objects by large-scale jitter and flips (Ghiasi et al., 2021, arXiv:2012.07177)."""

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

_CUT_TOLERANCE = 1e-3  # pixels; if a crop cuts off more of a box, the box is recomputed from the mask


class Window(NamedTuple):
    """Describes a rectangle of an image, and the size of the view that the rectangle is resized to."""

    left: float
    """Left edge of the rectangle, in pixels of the image."""
    top: float
    """Top edge of the rectangle, in pixels of the image."""
    right: float
    """Right edge of the rectangle, in pixels of the image."""
    bottom: float
    """Bottom edge of the rectangle, in pixels of the image."""
    size: Size
    """Height and width, in pixels, to which the window's part of the image is resized."""
    is_flipped: bool = False
    """Whether the view is flipped horizontally."""

    def cut(self, image: Image.Image) -> Tensor:
        """Returns the view of an image, (3, height, width) uint8, resized bilinearly with antialiasing."""
        height, width = self.size
        pixels = image_pixels(image.resize((width, height), Image.Resampling.BILINEAR, box=self[:4]))
        return pixels.flip(-1) if self.is_flipped else pixels

    def clip(self, boxes_N4: Tensor) -> Tensor:
        """Clips boxes to the window; input and output are in pixels of the image, (N, 4)."""
        low, high = boxes_N4.new_tensor(self[:2] * 2), boxes_N4.new_tensor(self[2:4] * 2)
        return boxes_N4.clamp(low, high)

    def to_view(self, boxes_N4: Tensor) -> Tensor:
        """Converts boxes from pixels of the image to pixels of the view, (N, 4)."""
        height, width = self.size
        x, y = width / (self.right - self.left), height / (self.bottom - self.top)
        moved = (boxes_N4 - boxes_N4.new_tensor(self[:2] * 2)) * boxes_N4.new_tensor((x, y, x, y))
        if not self.is_flipped:
            return moved
        left, top, right, bottom = moved.unbind(1)
        return torch.stack([width - right, top, width - left, bottom], 1)


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter:
    """Resizes an image by a random factor, crops it to at most `image_size`, may flip it, and jitters its colors.

    The resized image fits into a square whose side is the factor times `image_size`. Unlike Detectron2, this class does
    not pad small images. A batch therefore contains images of different sizes.
    """

    image_size: int
    """Maximum side of a view in pixels."""
    min_scale: float
    """Smallest resize factor."""
    max_scale: float
    """Largest resize factor."""
    flip_probability: float
    """Probability of a horizontal flip."""
    color_jitter: float
    """Strength of brightness, contrast and saturation jitter."""
    with_masks: bool
    """Whether objects have masks."""

    def draw(self, size: Size, rng: np.random.Generator) -> Window:
        """Draws a random window of an image.

        Args:
            size: height and width of the image in pixels.
            rng: random generator.
        """
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
        """Returns a random view of an RGB image, (3, height, width) float32 in [-1, 1], and the objects in the view.

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
    """Returns the objects inside a window; an object cut by the window gets the box of its visible part.

    With masks, this box encloses the visible part of the mask. Without masks, the object's box is clipped to the
    window.

    Args:
        objects: all objects of the image.
        size: height and width of the image in pixels.
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
    """Returns a window that covers a whole image. The image is resized so that its longer side has `side` pixels.

    Args:
        size: height and width of the image in pixels.
        side: longer side of the resized image in pixels.
        is_flipped: whether to flip the resized image horizontally.
    """
    height, width = size
    factor = side / max(size)
    return Window(0, 0, width, height, (max(1, round(height * factor)), max(1, round(width * factor))), is_flipped)
