"""Defines the position of a run in a stream of samples: the epoch, and the number of samples used in that epoch.

Checkpoints store the positions, so that a resumed run continues with the unused samples.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from beit3_ds.data.order.mixture import positions_per_source
from beit3_ds.data.order.permutation import block_key
from beit3_ds.data.order.remaining import RemainingSamples, from_nodes, gone_bounds


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """Describes a source as it was when the checkpoint was saved."""

    id: int
    """Permanent id of the source in this stream; does not depend on the order of sources in the config."""
    path: str
    """Path of the source in the config."""
    size: int
    """Number of samples in the source."""
    digest: str
    """Digest of all samples in the source (`prefix_digest.prefix_digest`)."""


@dataclass(frozen=True, kw_only=True)
class SetPosition:
    """Holds the position in one set of samples. The samples of a set are shuffled together.

    With sampling weights, each source is a set. Without them, all sources of the stream form one set.
    """

    epoch: int
    """The current epoch, from 0."""
    taken: int
    """Number of samples used so far from the permutation that `key` selects."""
    key: tuple[str | int, ...]
    """Key of the current permutation. The run's seed and this key select a permutation of `remaining`, or of all
    samples in the set if `remaining` is None."""
    remaining: tuple[Any, ...] | None = None
    """Samples that were unused when the rest of this epoch was last shuffled again, as JSON (`remaining.to_nodes`).

    A run that resumes with changed data, sampling weights or seed shuffles the unused samples again (`resuming`). None
    if this has not happened in this epoch.
    """
    num_remaining: int | None = None
    """Number of samples in `remaining`; None if `remaining` is None."""


@dataclass(frozen=True, kw_only=True)
class RemovedSource:
    """Describes a source that was removed from the config, with the unused samples of its epoch.

    If the source is added to the config again, its epoch continues with these samples.
    """

    source: SourcePosition
    epoch: int
    remaining: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Holds the position of a run in one stream, as plain data; does not depend on the layout of ranks."""

    stream: str
    seed: int
    """Seed of the run, with which the epochs are shuffled."""
    samples_per_step: int
    weights: tuple[float, ...] | None
    """Sampling weights of the sources; None if the samples of all sources are shuffled together, as one set."""
    mixture_position: int
    """Number of samples used from all sources since the sources or their sampling weights last changed."""
    sources: tuple[SourcePosition, ...]
    """The sources, in the order of the config. The samples of the stream are numbered in the order of these sources."""
    sets: tuple[SetPosition, ...]
    """Position in each set of samples. With sampling weights, each source is a set. Without them, all sources together
    are one set."""
    removed: tuple[RemovedSource, ...] = ()
    """Sources that are no longer in the config."""
    next_id: int
    """Id for the next new source."""
    blocks: tuple[int, int] | None = None
    """Samples per block and blocks per window (`permutation.BlockPermutation`); None shuffles each epoch as a whole."""
    changes: int = 0
    """Number of times that the run was resumed with changed data, sampling weights or seed."""

    @property
    def total(self) -> int:
        """Returns the number of samples in the stream."""
        return sum(source.size for source in self.sources)

    def base_key(self, set_index: int) -> tuple[str | int, ...]:
        """Returns the part of a set's permutation key that does not depend on the epoch. The sets of a stream have
        different keys.

        Args:
            set_index: index of the set in `sets`.
        """
        key = (self.stream,) if self.weights is None else (self.stream, set_index)
        return key if self.blocks is None else (*key, block_key(*self.blocks))

    def set_bounds(self, set_index: int) -> tuple[int, int]:
        """Returns the bounds of one set: its first sample number in the stream, and one past its last sample number.

        A set is a group of samples that are shuffled together (`SetPosition`).

        Args:
            set_index: index of the set in `sets`.
        """
        if self.weights is None:
            return 0, self.total
        start = sum(source.size for source in self.sources[:set_index])
        return start, start + self.sources[set_index].size

    def bounds(self, source_id: int) -> tuple[int, int]:
        """Returns the first sample number of a source in the stream, and one past the source's last sample number.

        A removed source gets numbers outside the stream (`remaining.gone_bounds`).
        """
        start = 0
        for source in self.sources:
            if source.id == source_id:
                return start, start + source.size
            start += source.size
        return gone_bounds(source_id)

    def remaining(self, set_index: int) -> RemainingSamples | None:
        """Returns the samples that remained in a set's epoch when the run last resumed with a change; None if there was
        no change in this epoch.

        If data, sampling weights or the seed have changed, a resumed run shuffles the remaining samples of the epoch
        again. If the stream has sampling weights, each source is a set. Without sampling weights, the whole stream is
        one set.

        Args:
            set_index: index of the set in `sets`.
        """
        nodes = self.sets[set_index].remaining
        return None if nodes is None else from_nodes(nodes, self.bounds)

    def start_epoch(self, set_index: int, epoch: int) -> SetPosition:
        """Returns the position of one set of samples at the start of an epoch.

        Args:
            set_index: index of the set in `sets`.
            epoch: the epoch, from 0.
        """
        return SetPosition(epoch=epoch, taken=0, key=(*self.base_key(set_index), epoch))

    def advanced(self, samples: int) -> "StreamPosition":
        """Returns the position after the next `samples` samples of the stream."""
        if samples == 0:
            return self
        if self.weights is None:
            moves = [samples]
        else:
            before, after = (
                positions_per_source(self.weights, position)
                for position in (self.mixture_position, self.mixture_position + samples)
            )
            moves = [last - first for first, last in zip(before, after, strict=True)]
        sets = tuple(self._moved(set_index, move) for set_index, move in enumerate(moves))
        return dataclasses.replace(self, mixture_position=self.mixture_position + samples, sets=sets)

    def _moved(self, set_index: int, samples: int) -> SetPosition:
        position = self.sets[set_index]
        first, last = self.set_bounds(set_index)
        left = (last - first if position.num_remaining is None else position.num_remaining) - position.taken
        if samples < left:
            return dataclasses.replace(position, taken=position.taken + samples)
        epochs, taken = divmod(samples - left, last - first)
        return dataclasses.replace(self.start_epoch(set_index, position.epoch + 1 + epochs), taken=taken)

    def to_json(self) -> dict[str, Any]:
        """Returns the position as a JSON object, without the stream's name."""
        content = dataclasses.asdict(self)
        del content["stream"]
        return content


def start_position(
    stream: str,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    sources: Sequence[SourcePosition],
    blocks: tuple[int, int] | None = None,
) -> StreamPosition:
    """Builds the position at the start of a stream: no sample is taken yet.

    Args:
        stream: name of the stream: "images", "pairs" or "texts".
        seed: the run's seed.
        samples_per_step: samples of the stream per step.
        weights: sampling weights of the sources; None if the sources form one set.
        sources: the sources, in the order of the config, with the ids 0, 1, 2, ...
        blocks: samples per block and blocks per window; None shuffles each epoch as a whole.
    """
    position = StreamPosition(
        stream=stream,
        seed=seed,
        samples_per_step=samples_per_step,
        weights=None if weights is None else tuple(weights),
        mixture_position=0,
        sources=tuple(sources),
        sets=(),
        next_id=len(sources),
        blocks=blocks,
    )
    sets = tuple(position.start_epoch(set_index, 0) for set_index in range(1 if weights is None else len(sources)))
    return dataclasses.replace(position, sets=sets)
