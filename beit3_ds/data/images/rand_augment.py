"""Distorts images at random for fine-tuning (RandAugment; Cubuk et al., 2019, arXiv:1909.13719)."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

_PROBABILITY = 0.5  # probability of applying a drawn operation, as in timm and in the reference
_MAX_LEVEL = 10.0
_GREY = (128, 128, 128)  # color of pixels that the moved image no longer covers

Operation = Callable[[Image.Image, float, float], Image.Image]
"""Function that distorts an image. Takes the image, a strength in [0, 1] and a sign, 1 or -1."""


def _affine(image: Image.Image, x_of_y: float = 0, y_of_x: float = 0, right: float = 0, down: float = 0) -> Image.Image:
    matrix = (1, x_of_y, right, y_of_x, 1, down)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=_GREY)


def _rotate(image: Image.Image, level: float, sign: float) -> Image.Image:
    return image.rotate(sign * 30 * level, Image.Resampling.BILINEAR, fillcolor=_GREY)


OPERATIONS: dict[str, Operation] = {
    "identity": lambda image, level, sign: image,
    "auto contrast": lambda image, level, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign: ImageOps.equalize(image),
    "brightness": lambda image, level, sign: ImageEnhance.Brightness(image).enhance(0.1 + 1.8 * level),
    "sharpness": lambda image, level, sign: ImageEnhance.Sharpness(image).enhance(0.1 + 1.8 * level),
    "shear x": lambda image, level, sign: _affine(image, x_of_y=sign * 0.3 * level),
    "shear y": lambda image, level, sign: _affine(image, y_of_x=sign * 0.3 * level),
    "translate x": lambda image, level, sign: _affine(image, right=sign * 0.45 * level * image.width),
    "translate y": lambda image, level, sign: _affine(image, down=sign * 0.45 * level * image.height),
    "rotate": _rotate,
}
"""RandAugment's operations by name; no operation mirrors the image."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """Draws random distortions for each image, and applies each distortion with probability 0.5."""

    num_operations: int
    """Number of operations drawn per image, with replacement."""
    magnitude: float
    """Strength of the operations, in [0, 10]."""

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Distorts an RGB image; takes all random numbers from `rng`."""
        names = list(OPERATIONS)
        for number in rng.integers(len(names), size=self.num_operations):
            applies, sign = rng.random() < _PROBABILITY, math.copysign(1, rng.random() - 0.5)
            if applies:
                image = OPERATIONS[names[number]](image, self.magnitude / _MAX_LEVEL, sign)
        return image
