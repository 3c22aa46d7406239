"""Augments images together with their label maps: scale jitter, crop, flip and photometric distortion."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from beit3_ds.data.images.augmentation import image_pixels, normalize
from beit3_ds.tasks.segmentation.config import IGNORED
from beit3_ds.tasks.segmentation.distortion import distort

_CROP_ATTEMPTS = 10
_MULTIPLE = 32  # pixels; the coarsest map has 1/32 of the sides


@dataclass(frozen=True, kw_only=True)
class CropAugmentation:
    """Draws a square crop of an image and its label map at a random scale.

    The scale defines the size of the crop before resizing: at scale factor 1, the crop's side is as long as the shorter
    side of the image. A crop may exceed the image; grey pixels without labels then pad the crop on the right and at the
    bottom. Only the crop is resized, not the whole image.
    """

    size: int
    """Side of the crop in pixels."""
    min_scale: float
    """Smallest scale factor."""
    max_scale: float
    """Largest scale factor."""
    max_class_share: float
    """Largest accepted share of one class in the labelled pixels. Up to ten crops are drawn until one is accepted. If
    none is accepted, the last crop is used."""
    flip_probability: float
    """Probability of a horizontal flip."""
    distorts: bool
    """Whether the colours of the crop are distorted at random (`distort`)."""

    def __call__(
        self, image: Image.Image, labels: NDArray[np.uint8], rng: np.random.Generator
    ) -> tuple[Tensor, NDArray[np.uint8]]:
        """Returns the crop, (3, size, size) float32 in [-1, 1], and its label map, (size, size) uint8.

        Args:
            image: RGB image.
            labels: class of each pixel, (height, width) uint8, `IGNORED` where unknown.
            rng: random generator.
        """
        factor = rng.uniform(self.min_scale, self.max_scale) * self.size / min(image.size)
        box, own = self._draw_box(image.size, labels, factor, rng)
        target = own.shape[1], own.shape[0]
        pixels = image_pixels(image.resize(target, Image.Resampling.BILINEAR, box=box)).float()
        if rng.random() < self.flip_probability:
            pixels, own = pixels.flip(-1), own[:, ::-1]
        if self.distorts:
            pixels = distort(pixels, rng)
        view = torch.zeros(3, self.size, self.size)
        view[:, : target[1], : target[0]] = normalize(pixels)
        padded = np.full((self.size, self.size), IGNORED, dtype=np.uint8)
        padded[: target[1], : target[0]] = own
        return view, padded

    def _draw_box(
        self, size: tuple[int, int], labels: NDArray[np.uint8], factor: float, rng: np.random.Generator
    ) -> tuple[tuple[float, float, float, float], NDArray[np.uint8]]:
        """Draws a random crop of an image and its label map.

        Args:
            size: width and height of the unscaled image in pixels.
            labels: class of each pixel of the unscaled image, (height, width).
            factor: factor by which the crop is scaled.
            rng: random generator.

        Returns:
            The crop's box (left, top, right, bottom) in pixels of the unscaled image, and the label map of the scaled
            crop.
        """
        target = [min(self.size, max(1, round(side * factor))) for side in size]
        spans = [min(side, pixels / factor) for side, pixels in zip(size, target, strict=True)]
        box, own = (0.0, 0.0, 0.0, 0.0), labels
        for _ in range(_CROP_ATTEMPTS):
            left, top = (float(rng.uniform(0, side - span)) for side, span in zip(size, spans, strict=True))
            box = left, top, left + spans[0], top + spans[1]
            own = labels[np.ix_(_nearest(top, spans[1], target[1]), _nearest(left, spans[0], target[0]))]
            counts = np.bincount(own[own != IGNORED], minlength=1)
            if counts.max() <= self.max_class_share * counts.sum():
                break
        return box, own


def _nearest(start: float, span: float, count: int) -> NDArray[np.int64]:
    """Divides [start, start + span) into `count` equal parts and returns the index of the pixel at the centre of each
    part.
    """
    return np.floor(start + (np.arange(count) + 0.5) * (span / count)).astype(np.int64)


def scaled_size(size: tuple[int, int], short_side: float) -> tuple[int, int]:
    """Returns the height and width, in pixels, to which a whole image is scaled for evaluation. Both are multiples of
    32.

    Args:
        size: height and width of the image in pixels.
        short_side: shorter side of the scaled image in pixels; the aspect ratio is kept, up to rounding.
    """
    factor = short_side / min(size)
    height, width = (max(1, round(side * factor / _MULTIPLE)) * _MULTIPLE for side in size)
    return height, width


def resize_whole(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """Resizes a whole RGB image and returns its pixels, (3, height, width) float32 in [-1, 1].

    Args:
        image: RGB image.
        size: new height and width in pixels.
    """
    return normalize(image_pixels(image.resize(size[::-1], Image.Resampling.BILINEAR)).float())


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """Returns the first pixel of each window along one side of an image; the windows cover the whole side.

    The last window ends at the end of the side.

    Args:
        side: length of the side in pixels.
        window: length of a window in pixels, at most `side`.
        stride: pixels between the starts of consecutive windows. The last two starts may be closer together.
    """
    count = 1 + math.ceil(max(0, side - window) / stride)
    return [min(number * stride, side - window) for number in range(count)]
