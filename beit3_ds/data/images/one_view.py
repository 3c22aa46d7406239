"""Augments or resizes an image to a model input, for ImageNet, VQA, NLVR2, captioning and retrieval."""

import dataclasses
import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from beit3_ds.config import RunConfig
from beit3_ds.config.data import Split
from beit3_ds.data.images.augmentation import (
    draw_colors,
    image_pixels,
    normalize,
    random_crop_box,
    resize_pixels,
    smallest_side,
)
from beit3_ds.data.images.rand_augment import RandAugment
from beit3_ds.pixels import to_floats

_SIDES = re.compile(r"\b(left|right)", re.IGNORECASE)
_ERASED_SHARE = (0.02, 1 / 3)
_ERASED_ASPECTS = (0.3, 10 / 3)


class ImageTransform(Protocol):
    """Interface of a transform from an image to a model input, (3, size, size) float32.

    Values are in [-1, 1], except in rectangles filled by random erasing. Model inputs are floats, because random
    erasing adds Gaussian noise and mixup interpolates between images. Pretraining does neither, and uses 8-bit views
    (`augmentation.Views`).
    """

    @property
    def min_side(self) -> int | None:
        """Returns how small an image may be decoded: the minimum length of its shorter side in pixels; None if the full
        size is needed.
        """

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Converts an RGB image to a model input; takes all random numbers from `rng`."""


@dataclass(frozen=True, kw_only=True)
class ResizedView:
    """Resizes a whole image to a square without cropping, as BEiT-3's reference code does for evaluation."""

    image_size: int
    """Side of the view in pixels."""

    @property
    def min_side(self) -> None:
        """Returns None: images are decoded in full size. A reduced size, which only JPEG supports, would change the
        view.
        """

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Resizes an RGB image to (3, image_size, image_size) float32 in [-1, 1]; does not use `rng`."""
        return whole_view(image, self.image_size)


def whole_view(image: Image.Image, image_size: int) -> Tensor:
    """Resizes a whole RGB image to a square, (3, image_size, image_size) float32 in [-1, 1]."""
    return normalize(resize_pixels(image_pixels(image), image_size, "bicubic").float())


@dataclass(frozen=True, kw_only=True)
class AugmentedView:
    """Augments an image by a random resized crop, flip, RandAugment, color jitter and random erasing, in this order."""

    image_size: int
    """Side of the view in pixels."""
    min_crop_scale: float
    """Smallest fraction of the image's area that a crop covers."""
    flip_probability: float
    """Probability of a horizontal flip."""
    distortion: RandAugment
    """Distortions of the crop by RandAugment."""
    color_jitter: float
    """Jitter strength: factors of brightness, contrast and saturation lie in [1 - color_jitter, 1 + color_jitter]."""
    erasing_probability: float
    """Probability that noise replaces a random rectangle (Zhong et al., 2017, arXiv:1708.04896)."""

    @property
    def min_side(self) -> int | None:
        """Returns how long a decoded image's shorter side must be, in pixels, so that no crop is enlarged; None if
        `min_crop_scale` is 0.
        """
        return smallest_side(self.image_size, self.min_crop_scale)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        """Augments an RGB image to (3, image_size, image_size) float32; takes all random numbers from `rng`."""
        crop = image.crop(random_crop_box(image.size, self.min_crop_scale, rng))
        pixels = resize_pixels(image_pixels(crop), self.image_size, "bicubic")
        if rng.random() < self.flip_probability:
            pixels = pixels.flip(-1)
        if self.distortion.num_operations:
            picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            pixels = image_pixels(self.distortion(picture, rng))
        colors = draw_colors(pixels, self.color_jitter, rng)[None] if self.color_jitter else None
        view = to_floats(pixels[None], colors)[0]
        if rng.random() < self.erasing_probability:
            _erase(view, rng)
        return view


def build_train_view(config: RunConfig, flip_probability: float) -> AugmentedView:
    """Builds the training augmentation from the config's "data" section.

    Args:
        config: config of the run.
        flip_probability: probability of a horizontal flip.
    """
    data = config.data
    return AugmentedView(
        image_size=config.model.image_size,
        min_crop_scale=data.min_crop_scale,
        flip_probability=flip_probability,
        distortion=RandAugment(num_operations=data.rand_augment_operations, magnitude=data.rand_augment_magnitude),
        color_jitter=data.color_jitter,
        erasing_probability=data.random_erasing,
    )


@dataclass(frozen=True, kw_only=True)
class PairView:
    """Chooses the transform of an image. If a text of the image contains a word like "left" or "right", the transform
    does not flip the image.
    """

    default: ImageTransform
    """Transform for an image whose texts contain no word like "left" or "right"; may flip the image."""
    unflipped: ImageTransform
    """Transform for an image with a text that contains a word like "left" or "right": like `default`, but no flips."""

    @property
    def min_side(self) -> int | None:
        """Returns the minimum length of a decoded image's shorter side in pixels; None if the full size is needed."""
        return self.default.min_side

    def of(self, *texts: str) -> ImageTransform:
        """Returns the transform for an image with these texts, such as a question and its answers."""
        return self.unflipped if any(map(_SIDES.search, texts)) else self.default


def build_pair_view(config: RunConfig, split: Split) -> PairView:
    """Builds the transforms of images with texts: augments the training split, and only resizes other splits."""
    if split != "train":
        resized = ResizedView(image_size=config.model.image_size)
        return PairView(default=resized, unflipped=resized)
    default = build_train_view(config, config.data.pair_flip_probability)
    return PairView(default=default, unflipped=dataclasses.replace(default, flip_probability=0.0))


def _erase(view: Tensor, rng: np.random.Generator) -> None:
    """Fills a random rectangle of a view with Gaussian noise (mean 0, standard deviation 1), in place."""
    size = view.shape[-1]
    area = size**2 * rng.uniform(*_ERASED_SHARE)
    aspect = math.exp(rng.uniform(*np.log(_ERASED_ASPECTS)))
    height, width = (min(size, max(1, round(side))) for side in (math.sqrt(area / aspect), math.sqrt(area * aspect)))
    top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
    noise = rng.standard_normal((3, height, width), dtype=np.float32)
    view[:, top : top + height, left : left + width] = torch.from_numpy(noise)
