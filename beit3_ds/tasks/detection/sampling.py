"""Samples the anchors and proposals for the losses of each image, from a seed stored in the batch."""

# N candidates of one image.

import torch
from torch import Tensor

from beit3_ds.data.samples import SampleKey

SEED_BITS = 62
"""Number of random bits in an image's seed."""

_GOLDEN, _MIX_1, _MIX_2 = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # SplitMix64's, as signed


def draw_seed(key: SampleKey) -> int:
    """Returns a seed for sampling in the head. The seed depends on the run's seed, the epoch and the sample."""
    return int(key.rng("samplers").integers(1 << SEED_BITS))


def random_priorities(seed: Tensor, count: int, purpose: int) -> Tensor:
    """Returns pseudo-random numbers that order the candidates for sampling, (count,) int64; equal on all devices.

    The candidates with the smallest numbers are sampled. SplitMix64 (Steele et al., 2014) computes the numbers from the
    seed, so no random generator on the device is needed.

    Args:
        seed: seed of the image, int64 scalar on the device.
        count: number of candidates.
        purpose: integer below 128; different purposes give independent numbers for one image.
    """
    start = seed ^ (purpose << SEED_BITS - 8)
    x_N = torch.arange(1, count + 1, device=seed.device) * _GOLDEN + start * _MIX_2
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        x_N = (x_N ^ _shift_right(x_N, shift)) * factor
    return x_N ^ _shift_right(x_N, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def sample_balanced(
    is_positive_N: Tensor, is_negative_N: Tensor, size: int, positive_share: float, priorities_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples at most `size` candidates: positive ones up to `positive_share`, the rest negative.

    Args:
        is_positive_N: whether each candidate matches an object, (N,) bool.
        is_negative_N: whether each candidate is background, (N,) bool; a candidate may be neither positive nor
            negative.
        size: maximum number of candidates to sample.
        positive_share: maximum share of positive candidates in `size`.
        priorities_N: random number of each candidate (`random_priorities`), (N,) int64.

    Returns:
        Indices of the sampled positive candidates and of the sampled negative candidates, each ascending.
    """
    most = int(size * positive_share)
    first = _smallest(is_positive_N, most, priorities_N), _smallest(is_negative_N, size, priorities_N)
    positive, negative = torch.stack([is_positive_N.sum(), is_negative_N.sum()]).tolist()  # waits for the device
    positive = min(positive, most)
    negative = min(negative, size - positive)
    return first[0][:positive].sort().values, first[1][:negative].sort().values


def _smallest(is_wanted_N: Tensor, count: int, priorities_N: Tensor) -> Tensor:
    """Returns `count` indices: first those of wanted candidates, in ascending order of `priorities_N`, then arbitrary
    others.

    Returns all indices if there are fewer than `count` candidates.
    """
    priorities_N = torch.where(is_wanted_N, priorities_N, torch.iinfo(priorities_N.dtype).max)
    return priorities_N.topk(min(count, len(priorities_N)), largest=False).indices
