"""Computes random permutations without storing them."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.randomness import sample_rng

_ROUNDS = 8  # four make a Feistel network pseudo-random (Luby and Rackoff, 1988); tiny domains need more
_BLOCKS = "blocks "


class KeyedPermutation:
    """Computes a random permutation of range(size) in constant memory.

    A Feistel network permutes range(4^b), where b is the smallest integer with 4^b >= size. As long as a result is
    outside range(size), it is permuted again (cycle walking). On average, the network is applied fewer than four times
    per sample.
    """

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        assert size >= 1, f"cannot permute {size} samples"
        self._size = np.uint64(size)
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = (np.uint64(1) << self._half_bits) - np.uint64(1)
        self._keys = rng.integers(0, 2**64, _ROUNDS, dtype=np.uint64)

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps positions in [0, size) to samples in [0, size); argument and result are (n,) int64."""
        samples = self._feistel(positions.astype(np.uint64))
        while (outside := samples >= self._size).any():
            samples[outside] = self._feistel(samples[outside])
        return samples.astype(np.int64)

    def _feistel(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = numbers >> self._half_bits, numbers & self._half_mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) >> (np.uint64(64) - self._half_bits))
        return (left << self._half_bits) | right


class BlockPermutation:
    """Computes a permutation of range(size) that keeps neighbouring samples close together. Needs constant memory.

    The samples form a ring: sample 0 follows the last sample. From a random sample on, the ring is cut into blocks of
    consecutive samples. The blocks are put into a random order. A window is a fixed number of blocks that are
    consecutive in this order. If `size` is not a multiple of the block size, the remaining samples join the last
    window. The samples of each window are shuffled.
    """

    def __init__(self, size: int, seed: int, key: Sequence[str | int], block: int, window: int) -> None:
        """Draws the order of the blocks.

        Args:
            size: number of samples.
            seed: the run's seed.
            key: identifies this permutation among the permutations of one run.
            block: number of samples per block.
            window: number of blocks per window.
        """
        self._size, self._seed, self._key, self._block, self._window = size, seed, key, block, window
        self._num_blocks = size // block
        rng = sample_rng(seed, "order of blocks", *key)
        self._shift = int(rng.integers(size))
        self._blocks = KeyedPermutation(self._num_blocks, rng) if self._num_blocks else None

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Maps positions in [0, size) to samples in [0, size); argument and result are (n,) int64."""
        last_window = max(0, -(-self._num_blocks // self._window) - 1)
        windows = np.minimum(positions // (self._block * self._window), last_window)
        samples = np.empty_like(positions)
        for window in np.unique(windows):
            here = windows == window
            samples[here] = self._within(int(window), window == last_window, positions[here])
        return (samples + self._shift) % self._size

    def _within(self, window: int, is_last: bool, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        first = window * self._window * self._block
        size = self._size - first if is_last else self._window * self._block
        rng = sample_rng(self._seed, "order in a window", *self._key, window)
        places = first + KeyedPermutation(size, rng)(positions - first)
        ranks, offsets = np.divmod(places, self._block)
        in_block = ranks < self._num_blocks
        samples = places.copy()  # the samples beyond the last whole block
        if self._blocks is not None and in_block.any():
            samples[in_block] = self._blocks(ranks[in_block]) * self._block + offsets[in_block]
        return samples


def order_permutation(seed: int, key: Sequence[str | int], size: int) -> KeyedPermutation | BlockPermutation:
    """Builds the permutation of range(size) for a seed and a key.

    The result is a `BlockPermutation` if the key contains the result of `block_key`, otherwise a `KeyedPermutation`.
    """
    for part in key:
        if isinstance(part, str) and part.startswith(_BLOCKS):
            block, window = map(int, part.removeprefix(_BLOCKS).split("x"))
            return BlockPermutation(size, seed, key, block, window)
    return KeyedPermutation(size, sample_rng(seed, "order", *key))


def block_key(block: int, window: int) -> str:
    """Returns text such as `blocks 256x16` for the key of a permutation.

    If a key contains this text, `order_permutation` builds a `BlockPermutation`.

    Args:
        block: number of samples per block.
        window: number of blocks per window.
    """
    return f"{_BLOCKS}{block}x{window}"


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mixes 64-bit words with SplitMix64's finaliser (Steele et al., 2014): all input bits affect each output bit."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
