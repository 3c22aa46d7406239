"""Mixes pairs of images by mixup or CutMix."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WHOLE = 1 << 16
"""Integer that stands for the share 1. Shares of images in mixtures are integers in units of 1 / WHOLE, and are
therefore exactly equal on all ranks."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """Mixes an image with a second image by mixup or CutMix."""

    mixup: float
    """Parameter a of the distribution Beta(a, a) from which mixup draws shares; 0 disables mixup."""
    cutmix: float
    """Parameter a of the distribution Beta(a, a) from which CutMix draws shares; 0 disables CutMix."""
    probability: float
    """Probability that an image is mixed."""

    def applies(self, rng: np.random.Generator) -> bool:
        """Draws whether to mix an image."""
        return bool((self.mixup or self.cutmix) and rng.random() < self.probability)

    def __call__(self, own: Tensor, other: Tensor, rng: np.random.Generator) -> tuple[Tensor, int]:
        """Mixes two images by mixup or CutMix.

        Args:
            own: first image, (3, size, size).
            other: second image, (3, size, size).
            rng: random generator.

        Returns:
            The mixed image, (3, size, size), and the share of `own` in the mixed image, in units of 1 / `WHOLE`.
        """
        cuts = not self.mixup or (bool(self.cutmix) and rng.random() < 0.5)
        strength = self.cutmix if cuts else self.mixup
        share = float(rng.beta(strength, strength))
        if not cuts:
            parts = round(share * WHOLE)
            return torch.lerp(other, own, parts / WHOLE), parts
        size = own.shape[-1]
        side = round(size * math.sqrt(1 - share))
        top, bottom = _span(int(rng.integers(size)), side, size)
        left, right = _span(int(rng.integers(size)), side, size)
        mixed = own.clone()
        mixed[:, top:bottom, left:right] = other[:, top:bottom, left:right]
        return mixed, round((1 - (bottom - top) * (right - left) / size**2) * WHOLE)


def _span(center: int, side: int, size: int) -> tuple[int, int]:
    """Returns start and stop of a span of `side` pixels around `center`, clipped to [0, size)."""
    return max(0, center - side // 2), min(size, center - side // 2 + side)
