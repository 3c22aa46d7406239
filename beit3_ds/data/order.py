"""Which sample stands at which position: endless, shuffled anew every epoch, computed and never stored.

Randomness: the order of a stream's only set of samples is keyed by (seed, stream, epoch), that of one source among
weighted ones by (seed, stream, source, epoch). Which source's turn it is, is not random at all (`take_turns`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.randomness import sample_rng

_ROUNDS = 8  # four make a Feistel network pseudo-random (Luby and Rackoff, 1988); tiny domains need some more
_SHARE_PARTS = 10**6


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


@dataclass(frozen=True, kw_only=True)
class StreamOrder:
    """The endless order of a stream, a pure function of the position."""

    seed: int
    """The run's seed."""
    stream: str
    """The stream's name, so that streams of one size are not shuffled alike."""
    sizes: tuple[int, ...]
    """Samples of each source. The stream numbers its samples through: those of source 0, then those of source 1, ..."""
    weights: tuple[float, ...] | None
    """Relative shares of the sources; None takes all sources as one set."""

    def __call__(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Finds the epochs and the samples at positions; all (n,) int64.

        The epoch counts how often the sample's source was used up before, that of an unweighted stream how often all
        of it was.
        """
        if self.weights is None:
            return samples_at(self.seed, (self.stream,), positions, sum(self.sizes))
        turns, places = take_turns(self.weights, positions)
        epochs, samples = np.empty_like(positions), np.empty_like(positions)
        for source in np.unique(turns):
            here = turns == source
            key = (self.stream, int(source))
            epochs[here], samples[here] = samples_at(self.seed, key, places[here], self.sizes[source])
            samples[here] += sum(self.sizes[:source])
        return epochs, samples


def take_turns(weights: Sequence[float], positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Divides an endless order between sources, as evenly as their weights allow.

    Of n positions source 0 takes floor(n * its share), source 1 its share of what remains, and so on; the source whose
    number grows from p to p + 1 has position p. So every source goes through its own places 0, 1, 2, ... without a gap,
    and its number differs from its share of the first n positions by less than the number of sources. Shares are
    rounded to a millionth: with integers alone this stays exact up to 9e12 positions.

    Args:
        weights: of each source, above 0.
        positions: (n,) int64.

    Returns:
        The source of each position and its place in the order of that source, (n,) int64 each.
    """
    parts = [max(1, round(weight / sum(weights) * _SHARE_PARTS)) for weight in weights]
    turns, places = np.empty_like(positions), np.empty_like(positions)
    left = positions  # of the positions so far, those that the sources before this one did not take
    unassigned = np.ones(len(positions), dtype=bool)
    for source, part in enumerate(parts):
        remaining = sum(parts[source:])
        taken = left * part // remaining
        here = unassigned & ((left + 1) * part // remaining > taken)
        turns[here], places[here] = source, taken[here]
        unassigned &= ~here
        left = left - taken
    return turns, places


def samples_at(
    seed: int, key: tuple[str | int, ...], positions: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Finds the samples at positions of one set's endless order.

    Position p lies in epoch p // size; every epoch holds each sample once, in an order of its own. Step s with k
    samples a step takes positions [s*k, (s+1)*k), so an epoch may end within a step.

    Args:
        seed: the run's seed.
        key: the stream and, if it has weights, the source: sets of one size are not shuffled alike.
        positions: (n,) int64.
        size: samples of the set.

    Returns:
        The epoch and the sample of each position, (n,) int64 each.
    """
    epochs, places = np.divmod(positions, size)
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = KeyedPermutation(size, sample_rng(seed, "order", *key, epoch))(places[here])
    return epochs, samples


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser: every output bit depends on every input bit (Steele et al., 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
