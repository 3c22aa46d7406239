"""Distorts the colours of an image, with the operations of SSD (Liu et al., 2016, arXiv:1512.02325, section 2.2)."""

import colorsys

import numpy as np
import torch
from torch import Tensor

_BRIGHTNESS = 32.0
_CONTRAST = _SATURATION = (0.5, 1.5)
_HUE = 0.1  # of the circle: 18 of OpenCV's 180 steps
_PROBABILITY = 0.5
_LUMA = torch.tensor([0.299, 0.587, 0.114])


def distort(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    """Changes brightness, contrast, saturation and hue of an image, each with probability 0.5.

    Brightness changes first. Contrast changes either directly after brightness or last, with equal probability. Unlike
    SSD, this function changes saturation and hue without conversion to HSV, at a tenth of the cost. Saturation blends
    colours with grey; hue rotates colours around the grey axis.

    Args:
        pixels: image, (3, height, width) float32 in [0, 255].
        rng: random generator.

    Returns:
        The distorted image, (3, height, width) float32 in [0, 255].
    """
    brightness = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS) if rng.random() < _PROBABILITY else 0.0
    contrast = rng.uniform(*_CONTRAST) if rng.random() < _PROBABILITY else 1.0
    contrast_first = rng.random() < _PROBABILITY
    saturation = rng.uniform(*_SATURATION) if rng.random() < _PROBABILITY else 1.0
    hue = rng.uniform(-_HUE, _HUE) if rng.random() < _PROBABILITY else 0.0
    pixels = (pixels + brightness).clamp_(0, 255)
    if contrast_first:
        pixels.mul_(contrast).clamp_(0, 255)
    if saturation != 1 or hue:
        matrix = turn_hue(hue) @ (saturation * torch.eye(3) + (1 - saturation) * _LUMA.expand(3, 3))
        pixels = torch.tensordot(matrix, pixels, 1).clamp_(0, 255)
    return pixels if contrast_first else pixels.mul_(contrast).clamp_(0, 255)


def turn_hue(share: float) -> Tensor:
    """Returns the matrix, (3, 3), that rotates RGB colours around the grey axis and keeps luma.

    Args:
        share: angle as a share of the full circle.
    """
    to_yiq = torch.tensor([colorsys.rgb_to_yiq(*row) for row in torch.eye(3).tolist()]).T
    angle = torch.tensor(2 * torch.pi * share)
    turn = torch.eye(3)
    turn[1:, 1:] = torch.stack([torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])])
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
