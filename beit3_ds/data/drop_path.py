"""Stochastic depth, drawn with the data so that the model's forward draws nothing."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from beit3_ds.data.randomness import sample_rng


class Slot(NamedTuple):
    """The place of a sample in its step, the same however ranks and micro-batches cut the step."""

    stream: str
    number: int


def draw_drop_path(rate: float, num_layers: int, seed: int, step: int, slots: Sequence[Slot]) -> Tensor | None:
    """Draws which sequences skip which branches (Huang et al., 2016, arXiv:1603.09382).

    Layer l of L skips with probability rate * l / (L - 1); both modalities of a pair skip together. Each factor is a
    pure function of (seed, step, slot, layer, branch), so every layout of ranks draws the same.

    Args:
        rate: probability at the last layer, below 1.
        num_layers: L.
        seed: the run's seed.
        step: the optimizer step.
        slots: the slot of each of the Q sequences.

    Returns:
        Factors of the attention and feed-forward branch, (Q, L, 2) float32: 0 for a skipped branch, else
        1 / (1 - probability), which keeps the mean; None if `rate` is 0.
    """
    if rate == 0:
        return None
    probability = np.linspace(0, rate, num_layers)[:, None]
    draws = np.empty((len(slots), num_layers, 2))
    for row, slot in enumerate(slots):
        draws[row] = sample_rng(seed, "drop path", step, *slot).random((num_layers, 2))
    factors = (draws >= probability) / (1 - probability)
    return torch.from_numpy(factors.astype(np.float32))
