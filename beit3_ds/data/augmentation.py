"""One crop of an image, seen twice: by the model and by the visual tokenizer (paper section 2.3)."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from beit3_ds.config import RunConfig

_CROP_ATTEMPTS = 10
_CROP_ASPECTS = (3 / 4, 4 / 3)

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a crop, in pixels."""


class Views(Protocol):
    """Makes the two views of one crop: the model's and the tokenizer's, (3, s, s) float32 in [-1, 1] each."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Makes both views of an RGB image; all draws come from `rng`."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random resized crop, flip and color jitter, the paper's augmentation for training.

    BEiT jitters the whole image before it crops. Here the crop comes first, because it leaves fewer pixels to jitter:
    brightness and saturation act on every pixel alone, so only contrast differs, which now turns about the mean of
    the crop. The jitter comes before the two resizes, so both views show the same colors.
    """

    image_size: int
    """Pixels on a side of the model's view."""
    tokenizer_image_size: int
    """Pixels on a side of the tokenizer's view."""
    min_crop_scale: float
    """Smallest share of the area that a crop keeps."""
    color_jitter: float
    """Factors of brightness, contrast and saturation lie in [1 - color_jitter, 1 + color_jitter]."""
    flip_probability: float
    """Probability that left and right change places."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Draws one crop of an RGB image and returns the model's and the tokenizer's view of it."""
        crop = image.crop(random_crop_box(image.size, self.min_crop_scale, rng))
        if rng.random() < self.flip_probability:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return _two_views(_jitter(crop, self.color_jitter, rng), self.image_size, self.tokenizer_image_size)


def build_augmentation(config: RunConfig, flip_probability: float) -> Augmentation:
    """The augmentation of a run; images and pairs may differ in how often they are flipped."""
    return Augmentation(
        image_size=config.model.image_size,
        tokenizer_image_size=config.tokenizers.visual.image_size,
        min_crop_scale=config.data.min_crop_scale,
        color_jitter=config.data.color_jitter,
        flip_probability=flip_probability,
    )


@dataclass(frozen=True, kw_only=True)
class CenterViews:
    """The largest square in the middle, the same at every evaluation."""

    image_size: int
    """Pixels on a side of the model's view."""
    tokenizer_image_size: int
    """Pixels on a side of the tokenizer's view."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Returns both views of an RGB image; draws nothing."""
        width, height = image.size
        side = min(width, height)
        crop = image.crop(_center_box(image.size, side, side))
        return _two_views(crop, self.image_size, self.tokenizer_image_size)


def random_crop_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> Box:
    """Draws a crop of random area and aspect (Szegedy et al., 2014, arXiv:1409.4842, section 6).

    The area's share is uniform in [min_scale, 1] and the aspect log-uniform in [3/4, 4/3]; if ten attempts do not fit
    into the image, the largest crop in its middle with an aspect in that interval is taken.

    Args:
        size: width and height of the image.
        min_scale: smallest share of the image's area.
        rng: where all draws come from.
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


def _center_box(size: tuple[int, int], crop_width: int, crop_height: int) -> Box:
    left, top = (size[0] - crop_width) // 2, (size[1] - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def _jitter(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Brightness, contrast and saturation in random order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for kind in rng.permutation(len(enhancers)):
        image = enhancers[kind](image).enhance(rng.uniform(1 - strength, 1 + strength))
    return image


def _two_views(crop: Image.Image, image_size: int, tokenizer_image_size: int) -> tuple[Tensor, Tensor]:
    """Resizes one crop for the model (bicubic) and for the tokenizer (Lanczos), the filters of BEiT."""
    model_view = crop.resize((image_size, image_size), Image.Resampling.BICUBIC)
    tokenizer_view = crop.resize((tokenizer_image_size, tokenizer_image_size), Image.Resampling.LANCZOS)
    return _to_tensor(model_view), _to_tensor(tokenizer_view)


def _to_tensor(image: Image.Image) -> Tensor:
    """Pixels 0..255 of (s, s) RGB to (3, s, s) float32 in [-1, 1]: mean and deviation 0.5."""
    pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
    return torch.from_numpy(pixels).div_(127.5).sub_(1)
