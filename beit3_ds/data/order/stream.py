"""Computes the order of a stream's samples without storing the order. Every epoch has a new random order.

Without sampling weights, all samples of a stream form one set, and the order follows from (seed, stream, epoch). With
sampling weights, each source has a separate order, and a fixed rule picks the source of each sample
(`mixture.assign_sources`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from beit3_ds.data.order.mixture import assign_sources, positions_per_source
from beit3_ds.data.order.permutation import order_permutation
from beit3_ds.data.order.positions import SourcePosition, StreamPosition, start_position


class StreamOrder:
    """Computes which samples of a stream follow a stored position, over any number of epochs."""

    def __init__(self, position: StreamPosition) -> None:
        """Stores the position at which this order starts; offset 0 is the first sample after this position.

        Raises:
            ValueError: if the position contradicts itself, for example after an edit of the checkpoint. In a set with
                `SetPosition.remaining`, `num_remaining` must be the number of samples in `remaining`, and `taken` must
                not exceed `num_remaining`.
        """
        self.position = position
        self._remaining = [position.remaining(set_index) for set_index in range(len(position.sets))]
        for one, remaining in zip(position.sets, self._remaining, strict=True):
            if remaining is not None and not one.taken <= len(remaining) == one.num_remaining:
                raise ValueError(f"{one.taken} of {one.num_remaining} samples are taken where {len(remaining)} remain")
        self._places = (
            None if position.weights is None else positions_per_source(position.weights, position.mixture_position)
        )

    def __call__(self, since: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the epochs and the sample numbers at given offsets from the stored position.

        With sampling weights, an epoch is one pass over the sample's source. Without them, an epoch is one pass over
        the whole stream. Sample numbers start with the samples of source 0, followed by source 1, and so on.

        Args:
            since: offsets in samples, (n,) int64.

        Returns:
            Epochs, (n,) int64, and sample numbers, (n,) int64.
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

    def _find(self, set_index: int, since: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Returns the epochs and the sample numbers at given offsets in one set, (n,) int64 each.

        With sampling weights, each source is a set. Without them, the whole stream is one set.

        Args:
            set_index: index of the set in `StreamPosition.sets`.
            since: number of samples of this set between the stored position and each requested sample, (n,) int64.
        """
        position, remaining = self.position.sets[set_index], self._remaining[set_index]
        first, last = self.position.set_bounds(set_index)
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
                self.position.seed, self.position.base_key(set_index), later, last - first, position.epoch + 1
            )
            epochs[~now], samples[~now] = found, chosen + first
        return epochs, samples


def order_from_start(
    seed: int, stream: str, sizes: Sequence[int], weights: Sequence[float] | None = None
) -> StreamOrder:
    """Builds the order of a stream's samples, from the first sample on.

    Args:
        seed: the run's seed.
        stream: name of the stream: "images", "pairs" or "texts".
        sizes: number of samples in each source.
        weights: sampling weights of the sources; None if the sources form one set.
    """
    sources = [SourcePosition(id=i, path=str(i), size=size, digest="") for i, size in enumerate(sizes)]
    return StreamOrder(start_position(stream, seed, 0, weights, sources))


def samples_at(
    seed: int, key: tuple[str | int, ...], positions: NDArray[np.int64], size: int, first_epoch: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the epoch and the sample at each position in the endless order of one set.

    Position p is in epoch first_epoch + p // size. Every epoch contains each sample once, in a new order.

    Args:
        seed: the run's seed.
        key: key of the set, without the epoch (`StreamPosition.base_key`). Sets with different keys are shuffled
            differently.
        positions: positions in the order, (n,) int64.
        size: number of samples in the set.
        first_epoch: epoch of position 0.

    Returns:
        Epochs, (n,) int64, and samples, (n,) int64.
    """
    passed, places = np.divmod(positions, size)
    epochs = passed + first_epoch
    samples = np.empty_like(places)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        samples[here] = order_permutation(seed, (*key, int(epoch)), size)(places[here])
    return epochs, samples
