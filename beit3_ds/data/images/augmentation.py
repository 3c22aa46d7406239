"""Augments images: one crop, as one view for the model and one for the visual tokenizer (section 2.3)."""

# s pixels on a side of a view, h and w of a crop.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from beit3_ds.config import RunConfig

_CROP_ATTEMPTS = 10
_CROP_ASPECTS = (3 / 4, 4 / 3)
_BRIGHTNESS, _CONTRAST, _SATURATION = range(3)

ResizeFilter = Literal["bicubic", "lanczos"]
"""Filters for resizing images, both with antialiasing."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a crop, in pixels."""


class ViewTransform(Protocol):
    """Makes two views of one crop, for the model and for the tokenizer: (3, s, s) float32 in [-1, 1] each."""

    @property
    def min_side(self) -> int | None:
        """Returns the pixels that an image's shorter side needs so that no view is enlarged; None for any size."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Makes both views of an RGB image, with all draws from `rng`."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Crops, flips and jitters colors at random: the paper's augmentation for training.

    BEiT jitters the whole image before it crops and resizes. Here the jitter comes last, on the views, which have the
    fewest pixels. Brightness, contrast and saturation are linear in the pixels, and so is a resize. The order therefore
    matters only for values that are clamped to 0 or 255, and for contrast, whose mean is taken over the crop instead of
    the image. Compared with Pillow's jitter of the crop (8 bits, before the resizes), pixels without clamping differ by
    at most 6 of 255 levels, 1.5 on average, by 8-bit rounding. On noise over all levels, the worst case, they differ by
    2.6 on average and by at most 81. Both views have the same factors and the same mean.
    """

    image_size: int
    """Pixels on a side of the model's view."""
    tokenizer_image_size: int
    """Pixels on a side of the tokenizer's view."""
    min_crop_scale: float
    """Smallest share of the image's area that a crop keeps."""
    color_jitter: float
    """Factors of brightness, contrast and saturation are in [1 - color_jitter, 1 + color_jitter]."""
    flip_probability: float
    """Probability of a horizontal flip."""

    @property
    def min_side(self) -> int | None:
        """Returns the pixels that an image's shorter side needs for its smallest crop to fill the larger view."""
        return smallest_side(max(self.image_size, self.tokenizer_image_size), self.min_crop_scale)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draws one crop of an RGB image; returns the views of the model and of the tokenizer."""
        box = random_crop_box(image.size, self.min_crop_scale, rng)
        flipped = rng.random() < self.flip_probability
        views = _two_views(image.crop(box), self.image_size, self.tokenizer_image_size)
        if flipped:
            views = views[0].flip(-1), views[1].flip(-1)
        floats = views[0].float(), views[1].float()
        jitter(floats, self.color_jitter, rng)
        return normalize(floats[0]), normalize(floats[1])


def build_augmentation(config: RunConfig, flip_probability: float) -> Augmentation:
    """Builds the augmentation of a run; images and pairs may have different flip probabilities.

    Without BEiT-3, both views have the size of the tokenizer's.
    """
    tokenizer_image_size = config.tokenizers.visual.image_size
    return Augmentation(
        image_size=tokenizer_image_size if config.backbone is None else config.backbone.image_size,
        tokenizer_image_size=tokenizer_image_size,
        min_crop_scale=config.data.min_crop_scale,
        color_jitter=config.data.color_jitter,
        flip_probability=flip_probability,
    )


@dataclass(frozen=True, kw_only=True)
class CenterViews:
    """Makes views of the largest square in the middle of an image, the same at every evaluation."""

    image_size: int
    """Pixels on a side of the model's view."""
    tokenizer_image_size: int
    """Pixels on a side of the tokenizer's view."""

    @property
    def min_side(self) -> None:
        """Returns None, so that images are decoded in full size and views do not depend on the file format."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Returns both views of an RGB image, without random draws."""
        return center_view(image, self.image_size), center_view(image, self.tokenizer_image_size, "lanczos")


def center_view(image: Image.Image, size: int, filter: ResizeFilter = "bicubic") -> Tensor:
    """Resizes and normalises the largest square in the middle of an RGB image, to (3, size, size) in [-1, 1].

    Args:
        image: upright and in RGB, with all its pixels.
        size: pixels on a side of the view.
        filter: bicubic for the model, Lanczos for the visual tokenizer, as in BEiT.
    """
    side = min(image.size)
    crop = image.crop(_center_box(image.size, side, side))
    return normalize(resize_pixels(image_pixels(crop), size, filter).float())


def random_crop_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> Box:
    """Draws a crop of random area and aspect (Szegedy et al., 2014, arXiv:1409.4842, section 6).

    The share of the area is uniform in [min_scale, 1], and the aspect ratio is log-uniform in [3/4, 4/3]. If ten
    attempts do not fit into the image, the result is the largest crop in its middle with such an aspect ratio.

    Args:
        size: width and height of the image.
        min_scale: smallest share of the image's area.
        rng: generator of all draws.
    """
    width, height = size
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(min_scale, 1)
        aspect = math.exp(rng.uniform(*np.log(_CROP_ASPECTS)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = rng.integers(width - crop_width + 1), rng.integers(height - crop_height + 1)
            return int(left), int(top), int(left) + crop_width, int(top) + crop_height
    narrowest, widest = _CROP_ASPECTS
    crop_width, crop_height = min(width, round(height * widest)), min(height, round(width / narrowest))
    return _center_box(size, max(1, crop_width), max(1, crop_height))


def smallest_side(view_size: int, min_scale: float) -> int | None:
    """Returns the shorter side of an image whose smallest crop (`random_crop_box`) is as large as a view.

    Args:
        view_size: pixels on a side of the view.
        min_scale: smallest share of the image's area; 0 allows any crop, so the result is None.
    """
    if min_scale == 0:
        return None
    crop_side = math.sqrt(
        min_scale * min(_CROP_ASPECTS)
    )  # shorter side of the smallest crop, as a share of the image's
    return math.ceil(view_size / crop_side)


def _center_box(size: tuple[int, int], crop_width: int, crop_height: int) -> Box:
    left, top = (size[0] - crop_width) // 2, (size[1] - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _two_views(crop: Image.Image, image_size: int, tokenizer_image_size: int) -> tuple[Tensor, Tensor]:
    """Resizes one RGB crop for the model (bicubic) and for the tokenizer (Lanczos), with the filters of BEiT.

    Returns:
        (3, s, s) uint8 each.
    """
    pixels = image_pixels(crop)
    return resize_pixels(pixels, image_size, "bicubic"), resize_pixels(pixels, tokenizer_image_size, "lanczos")


def image_pixels(image: Image.Image) -> Tensor:
    """Returns an RGB image as (3, h, w) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_pixels(pixels: Tensor, size: int, mode: ResizeFilter) -> Tensor:
    """Resizes (3, h, w) uint8 within one level of Pillow's result; torch's kernels take half the time or less."""
    return F.interpolate(pixels[None], (size, size), mode=mode, antialias=True)[0]


def jitter(views: Sequence[Tensor], strength: float, rng: np.random.Generator) -> None:
    """Changes brightness, contrast and saturation in random order, in place on (3, s, s) float32 in [0, 255].

    Every step blends the view with another one (black, the mean grey, its own grey) and clamps, as Pillow's
    ImageEnhance does. Contrast uses the mean of the first view for all, because they must show the same colors.
    """
    for kind in rng.permutation((_BRIGHTNESS, _CONTRAST, _SATURATION)):
        factor = rng.uniform(1 - strength, 1 + strength)
        mean = float(_grey(views[0]).mean()) if kind == _CONTRAST else 0.0
        for view in views:
            other = _grey(view) if kind == _SATURATION else mean
            view.mul_(factor).add_(other * (1 - factor)).clamp_(0, 255)


def _grey(view: Tensor) -> Tensor:
    """Computes the luma of ITU-R 601, as Pillow's mode L does: (3, s, s) to (s, s)."""
    return (view[0] * 0.299).add_(view[1], alpha=0.587).add_(view[2], alpha=0.114)


def normalize(view: Tensor) -> Tensor:
    """Maps pixels from [0, 255] to [-1, 1] in place: mean and standard deviation 0.5."""
    return view.div_(127.5).sub_(1)
