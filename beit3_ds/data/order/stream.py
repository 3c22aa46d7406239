"""Endless order of samples: reshuffled every epoch, computed and never stored.

Randomness: the order of a stream's only set of samples is keyed by (seed, stream, epoch), the order of one of several
weighted sources by (seed, stream, source, epoch). The turns of sources are not random (`mixture.assign_sources`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.mixture import assign_sources, positions_per_source
from beit3_ds.data.order.permutation import order_permutation
from beit3_ds.data.order.positions import SourcePosition, StreamPosition, start_position


class StreamOrder:
    """The endless order of a stream from a position on, a pure function of the position and the samples since."""

    def __init__(self, position: StreamPosition) -> None:
        """Takes the position to start from."""
        self.position = position
        self._remaining = [position.remaining(number) for number in range(len(position.sets))]
        self._places = (
            None if position.weights is None else positions_per_source(position.weights, position.mixture_position)
        )

    def __call__(self, since: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Finds the epoch and the sample at each number of samples since the position; all (n,) int64.

        The epoch is the number of times that the sample's source was used up before (without weights: the whole
        stream). A stream numbers its samples consecutively: those of source 0, then those of source 1, and so on.
        """
        weights = self.position.weights
        if weights is None or self._places is None:
            return self._find(0, since)
        sources, places = assign_sources(weights, since + self.position.mixture_position)
        epochs, samples = np.empty_like(since), np.empty_like(since)
        for source in np.unique(sources):
            here = sources == source
            epochs[here], samples[here] = self._find(int(source), places[here] - self._places[source])
        return epochs, samples

    def _find(self, number: int, since: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the epochs and samples of one set at each number of samples since the position."""
        position, remaining = self.position.sets[number], self._remaining[number]
        first, last = self.position.set_bounds(number)
        left = last - first if remaining is None else len(remaining)
        places = since + position.taken
        now = places < left
        epochs, samples = np.empty_like(since), np.empty_like(since)
        if now.any():
            chosen = order_permutation(self.position.seed, position.key, left)(places[now])
            epochs[now] = position.epoch
            samples[now] = chosen + first if remaining is None else remaining(chosen)
        if not now.all():
            later = places[~now] - left
            found, chosen = samples_at(
                self.position.seed, self.position.base_key(number), later, last - first, position.epoch + 1
            )
            epochs[~now], samples[~now] = found, chosen + first
        return epochs, samples


def order_from_start(
    seed: int, stream: str, sizes: Sequence[int], weights: Sequence[float] | None = None
) -> StreamOrder:
    """Builds the order of a stream from its first sample on, for sources of these sizes."""
    sources = [SourcePosition(id=i, path=str(i), size=size, digest="") for i, size in enumerate(sizes)]
    return StreamOrder(start_position(stream, seed, 0, weights, sources))


def samples_at(
    seed: int, key: tuple[str | int, ...], positions: NDArray[np.int64], size: int, first_epoch: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Finds the samples at positions of one set's endless order.

    Position p is in epoch first_epoch + p // size; every epoch holds each sample once, in its own order. Step s with k
    samples per step takes positions [s*k, (s+1)*k), so an epoch may end within a step.

    Args:
        seed: the run's seed.
        key: the stream and, if it has weights, the source, so that sets of one size are shuffled differently.
        positions: (n,) int64.
        size: samples of the set.
        first_epoch: epoch of position 0.

    Returns:
        The epoch and the sample of each position, (n,) int64 each.
    """
    passed, places = np.divmod(positions, size)
    epochs = passed + first_epoch
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = order_permutation(seed, (*key, int(epoch)), size)(places[here])
    return epochs, samples
