"""Positions of the sources of a stream in their epochs, which a checkpoint stores and an order starts from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit3_ds.data.order.mixture import positions_per_source
from beit3_ds.data.order.permutation import block_key
from beit3_ds.data.order.remaining import RemainingSamples, from_nodes, gone_bounds

_OLD_NAMES = {
    "turns": "mixture_position",
    "unseen": "remaining",
    "num_unseen": "num_remaining",
    "parked": "removed",
}
"""Names of fields in checkpoints of development versions before 0.2, with their names now."""


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """A source as it was when its position was stored."""

    id: int
    """Number that it keeps in this stream, whatever its place among the sources."""
    path: str
    """Path in the config."""
    size: int
    """Samples."""
    digest: str
    """Digest of the numbers of its samples (`prefix_digest.prefix_digest`)."""


@dataclass(frozen=True, kw_only=True)
class SetPosition:
    """Position of a set of samples in its epochs: one source of a weighted stream, or all sources of another stream."""

    epoch: int
    """The current epoch, from 0."""
    taken: int
    """Samples taken of the set that `key` shuffles."""
    key: tuple[str | int, ...]
    """Key, beside the run's seed, of the permutation of the samples in `remaining`."""
    remaining: tuple[Any, ...] | None = None
    """Samples that the epoch had left when the data last changed (`remaining.to_nodes`); None is all of the set."""
    num_remaining: int | None = None
    """Samples in `remaining`."""


@dataclass(frozen=True, kw_only=True)
class RemovedSource:
    """A source that was removed from the config, with the rest of its epoch in case it is added again."""

    source: SourcePosition
    epoch: int
    remaining: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Position of a stream, as plain data that does not depend on the layout of ranks."""

    stream: str
    seed: int
    """The run's seed, which shuffles the epochs."""
    samples_per_step: int
    weights: tuple[float, ...] | None
    """Weights of the sources; None if they form one set."""
    mixture_position: int
    """Samples taken since the weights were last changed."""
    sources: tuple[SourcePosition, ...]
    """The sources in the order of the config, which also numbers the stream's samples."""
    sets: tuple[SetPosition, ...]
    """One set per source if there are weights, else one set."""
    removed: tuple[RemovedSource, ...] = ()
    """Sources that are no longer in the config."""
    next_id: int
    """Id of the next new source."""
    blocks: tuple[int, int] | None = None
    """Samples per block and blocks per window (`permutation.BlockPermutation`); None shuffles an epoch as a whole."""
    changes: int = 0
    """Number of times that the data changed between two starts."""

    @property
    def total(self) -> int:
        """Number of samples of the stream."""
        return sum(source.size for source in self.sources)

    def base_key(self, number: int) -> tuple[str | int, ...]:
        """Returns the key of a set's shuffles without the epoch; sets of one size are shuffled differently."""
        key = (self.stream,) if self.weights is None else (self.stream, number)
        return key if self.blocks is None else (*key, block_key(*self.blocks))

    def set_bounds(self, number: int) -> tuple[int, int]:
        """Returns the range of a set's sample numbers in the stream: the first, and one past the last."""
        if self.weights is None:
            return 0, self.total
        start = sum(source.size for source in self.sources[:number])
        return start, start + self.sources[number].size

    def bounds(self, source_id: int) -> tuple[int, int]:
        """See `remaining.Bounds`."""
        start = 0
        for source in self.sources:
            if source.id == source_id:
                return start, start + source.size
            start += source.size
        return gone_bounds(source_id)

    def remaining(self, number: int) -> RemainingSamples | None:
        """Returns the samples that a set's epoch had left when the data last changed; None is all."""
        nodes = self.sets[number].remaining
        return None if nodes is None else from_nodes(nodes, self.bounds)

    def start_epoch(self, number: int, epoch: int) -> SetPosition:
        """Returns a set at the beginning of an epoch."""
        return SetPosition(epoch=epoch, taken=0, key=(*self.base_key(number), epoch))

    def advanced(self, samples: int) -> "StreamPosition":
        """Returns the position after a number of further samples."""
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
        sets = tuple(self._moved(number, move) for number, move in enumerate(moves))
        return dataclasses.replace(self, mixture_position=self.mixture_position + samples, sets=sets)

    def _moved(self, number: int, samples: int) -> SetPosition:
        position = self.sets[number]
        first, last = self.set_bounds(number)
        left = (last - first if position.num_remaining is None else position.num_remaining) - position.taken
        if samples < left:
            return dataclasses.replace(position, taken=position.taken + samples)
        epochs, taken = divmod(samples - left, last - first)
        return dataclasses.replace(self.start_epoch(number, position.epoch + 1 + epochs), taken=taken)

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
    """Returns the position before the first sample; the ids of the sources must be 0, 1, 2, ... in their order."""
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
    sets = tuple(position.start_epoch(number, 0) for number in range(1 if weights is None else len(sources)))
    return dataclasses.replace(position, sets=sets)


def position_from_json(stream: str, content: Mapping[str, Any]) -> StreamPosition:
    """Rebuilds a position from the JSON object of `StreamPosition.to_json`."""
    fields = _with_current_names(content)
    fields["weights"] = None if fields["weights"] is None else tuple(fields["weights"])
    fields["blocks"] = None if fields.get("blocks") is None else tuple(fields["blocks"])
    fields["sources"] = tuple(SourcePosition(**source) for source in fields["sources"])
    fields["sets"] = tuple(_set_from_json(position) for position in fields["sets"])
    fields["removed"] = tuple(
        RemovedSource(
            source=SourcePosition(**removed["source"]),
            epoch=removed["epoch"],
            remaining=tuple(removed["remaining"]),
        )
        for removed in fields["removed"]
    )
    return StreamPosition(stream=stream, **fields)


def _set_from_json(content: Mapping[str, Any]) -> SetPosition:
    remaining = content["remaining"]
    return SetPosition(
        epoch=content["epoch"],
        taken=content["taken"],
        key=tuple(content["key"]),
        remaining=None if remaining is None else tuple(remaining),
        num_remaining=content["num_remaining"],
    )


def _with_current_names(content: Any) -> Any:
    if isinstance(content, dict):
        return {_OLD_NAMES.get(name, name): _with_current_names(value) for name, value in content.items()}
    return [_with_current_names(value) for value in content] if isinstance(content, list | tuple) else content
