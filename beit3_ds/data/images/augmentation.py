"""Augments images: makes two views of one crop, for the model and for the visual tokenizer (paper section 2.3)."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from beit3_ds.config import RunConfig
from beit3_ds.pixels import change_colors, grey

_CROP_ATTEMPTS = 10
_CROP_ASPECTS = (3 / 4, 4 / 3)
_BRIGHTNESS, _CONTRAST, _SATURATION = _COLOR_CHANGES = (0, 1, 2)

ResizeFilter = Literal["bicubic", "lanczos"]
"""Filter for resizing an image; both filters use antialiasing."""

Box = tuple[int, int, int, int]
"""Left, top, right and bottom of a crop, in pixels."""


class Views(NamedTuple):
    """Holds two views of one crop; `pixels.to_floats` converts them to network inputs."""

    model: Tensor
    """View for the model, (3, size, size), uint8 or float32 in [-1, 1]."""
    tokenizer: Tensor
    """View for the visual tokenizer, (3, size, size) uint8."""
    colors: Tensor | None = None
    """Parameters of three colour changes to apply to both views (`pixels.change_colors`), (3, 3) float32; None for no
    change."""


class ViewTransform(Protocol):
    """Interface of a function that makes two views of an image: one for the model and one for the visual tokenizer."""

    @property
    def min_side(self) -> int | None:
        """Returns the minimum length of a decoded image's shorter side in pixels; None if the full size is needed."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """Returns the views of an RGB image; takes all random numbers from `rng`."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Crops and flips an image at random, and draws random color jitter, as the paper's training augmentation does.

    BEiT applies the color jitter to the whole image, before the crop. In this project, the device applies the jitter to
    the two views of the crop, for the model and for the tokenizer, because they have fewer pixels than the image. Both
    views get the same factors. Without rounding, jitter before the crop and jitter after the crop would differ only in
    values that are clamped, and in the mean grey that the contrast change uses.

    The result was compared with Pillow. The Pillow reference applies the jitter after the crop but before the resize,
    and rounds values to 8 bits. In images without clamped values, pixels differ by at most 6 of 255 levels, and by 1.5
    on average. In images of pure noise, many values are clamped: pixels differ by at most 81 levels, and by 2.6 on
    average.
    """

    image_size: int
    """Side of the model's view in pixels."""
    tokenizer_image_size: int
    """Side of the tokenizer's view in pixels."""
    min_crop_scale: float
    """Smallest fraction of the image's area that a crop covers."""
    color_jitter: float
    """Jitter strength: factors of brightness, contrast and saturation lie in [1 - color_jitter, 1 + color_jitter]."""
    flip_probability: float
    """Probability of a horizontal flip."""

    @property
    def min_side(self) -> int | None:
        """Returns how long a decoded image's shorter side must be, in pixels, so that no crop is enlarged.

        Returns None if `min_crop_scale` is 0. Crops may then have any size, so images must be decoded in full size.
        """
        return smallest_side(max(self.image_size, self.tokenizer_image_size), self.min_crop_scale)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """Crops and flips an RGB image at random; draws color changes, which the device applies later."""
        box = random_crop_box(image.size, self.min_crop_scale, rng)
        flipped = rng.random() < self.flip_probability
        model, tokenizer = _two_views(image.crop(box), self.image_size, self.tokenizer_image_size)
        if flipped:
            model, tokenizer = model.flip(-1), tokenizer.flip(-1)
        colors = draw_colors(model, self.color_jitter, rng) if self.color_jitter else None
        return Views(model, tokenizer, colors)


def build_augmentation(config: RunConfig, flip_probability: float) -> Augmentation:
    """Builds the pretraining augmentation from a run's config.

    In a run without a BEiT-3 model, both views have the image size of the visual tokenizer.

    Args:
        config: config of the run.
        flip_probability: probability of a horizontal flip. It is not taken from `config`, because images and pairs have
            different settings there.
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
    """Makes the model's view and the tokenizer's view from the largest centered square of an image, for evaluation.

    Draws no random numbers.
    """

    image_size: int
    """Side of the model's view in pixels."""
    tokenizer_image_size: int
    """Side of the tokenizer's view in pixels."""

    @property
    def min_side(self) -> None:
        """Returns None: images are decoded in full size. A reduced size, which only JPEG supports, would change the
        views.
        """

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Views:
        """Returns both views of an RGB image; does not use `rng`."""
        return Views(center_pixels(image, self.image_size), center_pixels(image, self.tokenizer_image_size, "lanczos"))


def center_pixels(image: Image.Image, size: int, filter: ResizeFilter = "bicubic") -> Tensor:
    """Resizes the largest centered square of an RGB image to (3, size, size) uint8.

    Args:
        image: upright RGB image in full size.
        size: side of the result in pixels.
        filter: bicubic for the model, Lanczos for the visual tokenizer, as in BEiT.
    """
    side = min(image.size)
    crop = image.crop(_center_box(image.size, side, side))
    return resize_pixels(image_pixels(crop), size, filter)


def random_crop_box(size: tuple[int, int], min_scale: float, rng: np.random.Generator) -> Box:
    """Draws a crop with random area and aspect ratio (Szegedy et al., 2014, arXiv:1409.4842, section 6).

    The area, as a fraction of the image, is uniform in [min_scale, 1]. The aspect ratio is log-uniform in [3/4, 4/3].
    If none of ten draws fits into the image, the result is the largest centered crop with an aspect ratio in [3/4,
    4/3].

    Args:
        size: width and height of the image in pixels.
        min_scale: smallest fraction of the image's area that a crop covers.
        rng: random number generator.

    Returns:
        Left, top, right and bottom of the crop, in pixels.
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
    """Returns how long an image's shorter side must be, in pixels, so that no random crop is enlarged.

    Args:
        view_size: side in pixels to which the crops of `random_crop_box` are resized.
        min_scale: smallest fraction of the image's area that a crop covers. For 0, no size of the image suffices, and
            the result is None.
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
    """Resizes one RGB crop for the model (bicubic) and for the visual tokenizer (Lanczos), as BEiT does.

    Returns:
        The model's view and the tokenizer's view, each (3, size, size) uint8.
    """
    pixels = image_pixels(crop)
    return resize_pixels(pixels, image_size, "bicubic"), resize_pixels(pixels, tokenizer_image_size, "lanczos")


def image_pixels(image: Image.Image) -> Tensor:
    """Converts an RGB image to a tensor, (3, height, width) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize_pixels(pixels: Tensor, size: int, mode: ResizeFilter) -> Tensor:
    """Resizes an image, (3, height, width) uint8, to (3, size, size) with antialiasing.

    Takes at most half of Pillow's time. Values differ from Pillow's by at most one level. In some versions of torch,
    such as 2.11, there is no Lanczos filter; Pillow then computes this filter.
    """
    if mode == "lanczos" and not _torch_has_lanczos():
        image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
        return image_pixels(image.resize((size, size), Image.Resampling.LANCZOS))
    return F.interpolate(pixels[None], (size, size), mode=mode, antialias=True)[0]


@cache
def _torch_has_lanczos() -> bool:
    try:
        F.interpolate(torch.zeros(1, 1, 2, 2), (1, 1), mode="lanczos", antialias=True)
    except (NotImplementedError, ValueError):
        return False
    return True


def draw_colors(view: Tensor, strength: float, rng: np.random.Generator) -> Tensor:
    """Draws changes of brightness, contrast and saturation in random order, for `pixels.change_colors`.

    As in Pillow's ImageEnhance, each change blends the image with a second image. For brightness, this is a black
    image; for contrast, an image in the mean grey; for saturation, the image in greyscale. The mean grey is computed
    from `view`; other views of the crop get the same changes.

    Args:
        view: one view of the crop, (3, size, size) uint8.
        strength: factors are uniform in [1 - strength, 1 + strength].
        rng: random number generator.

    Returns:
        The three changes, (3, 3) float32. The row of a change has three values: factor of the pixels, weight of the
        greyscale, and offset.
    """
    colors = torch.zeros(len(_COLOR_CHANGES), 3)
    for place, kind in enumerate(rng.permutation(_COLOR_CHANGES)):
        factor = rng.uniform(1 - strength, 1 + strength)
        weight = offset = 0.0
        if kind == _SATURATION:
            weight = 1 - factor
        elif kind == _CONTRAST:
            changed = change_colors(view[None].float(), colors[None, :place])
            offset = float(grey(changed).mean()) * (1 - factor)
        colors[place] = torch.tensor([factor, weight, offset], dtype=torch.float64)
    return colors


def normalize(view: Tensor) -> Tensor:
    """Maps pixel values from [0, 255] to [-1, 1] in place; returns `view`."""
    return view.div_(127.5).sub_(1)
