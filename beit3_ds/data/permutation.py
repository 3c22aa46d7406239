"""Permutations that are computed and never stored."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.randomness import sample_rng

_ROUNDS = 8  # four make a Feistel network pseudo-random (Luby and Rackoff, 1988); tiny domains need some more


class KeyedPermutation:
    """A bijection of range(size), chosen by a generator's draws, in constant memory.

    A Feistel network permutes the smallest domain of 2^(2b) numbers that holds `size`; a number that lands outside
    range(size) is sent through again until it lands inside (cycle walking), fewer than four times on average.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        assert size >= 1, f"cannot permute {size} samples"
        self._size = np.uint64(size)
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._keys = rng.integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps positions in [0, size) to samples in [0, size); both (n,) int64."""
        samples = self._feistel(positions.astype(np.uint64))
        while (outside := samples >= self._size).any():
            samples[outside] = self._feistel(samples[outside])
        return samples.astype(np.int64)

    def _feistel(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half_bits, numbers & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) >> (np.uint64(64) - self._half_bits))
        return (left << self._half_bits) | right


def order_permutation(seed: int, key: Sequence[str | int], size: int) -> KeyedPermutation:
    """The permutation of (seed, key) over range(size)."""
    return KeyedPermutation(size, sample_rng(seed, "order", *key))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every output bit depends on every input bit (Steele et al., 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
