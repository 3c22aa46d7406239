"""Draws the factors of stochastic depth while data are prepared: the forward pass draws no random numbers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit3_ds.data.randomness import sample_rng


class Slot(NamedTuple):
    """Identifies a sequence within an optimizer step; does not depend on the number of ranks or micro-batches."""

    stream: str
    number: int
    """Index of the sample among the step's samples of one stream: images, pairs or texts."""
    sequence: int = 0
    """Index of the sequence within the sample."""


def draw_drop_path(rate: float, num_layers: int, seed: int, step: int, slots: Sequence[Slot]) -> Tensor | None:
    """Draws which branches each sequence skips in stochastic depth (Huang et al., 2016, arXiv:1603.09382).

    Layer l of L skips each branch with probability rate * l / (L - 1), for l from 0 to L - 1. If the image and the text
    of a pair are one sequence, they skip the same branches. Each draw depends only on (seed, step, slot, layer,
    branch).

    Args:
        rate: skip probability in the last layer, below 1.
        num_layers: number of layers, L.
        seed: seed of the run.
        step: number of the optimizer step.
        slots: identifier of each of the Q sequences within the step.

    Returns:
        Factors of the attention and feed-forward branches, (Q, L, 2) float32. A skipped branch has factor 0. A kept
        branch has factor 1 / (1 - probability), which preserves the mean. None if `rate` is 0.
    """
    if rate == 0:
        return None
    probability = np.linspace(0, rate, num_layers)[:, None]
    draws = np.empty((len(slots), num_layers, 2))
    for row, slot in enumerate(slots):
        place = slot if slot.sequence else slot[:2]
        draws[row] = sample_rng(seed, "drop path", step, *place).random((num_layers, 2))
    factors = (draws >= probability) / (1 - probability)
    return torch.from_numpy(factors.astype(np.float32))
