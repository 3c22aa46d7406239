"""Where every source of a stream is in its epochs: what a checkpoint stores, and what an order starts from."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from beit3_ds.data.permutation import block_key
from beit3_ds.data.turns import turns_taken
from beit3_ds.data.unseen import Unseen, from_nodes, gone_bounds


@dataclass(frozen=True, kw_only=True)
class SourcePosition:
    """A source as it was when its position was stored."""

    id: int
    """Number that it keeps in this stream, wherever it comes among the sources."""
    path: str
    """As the config names it."""
    size: int
    """Samples."""
    digest: str
    """Of which sample has which number (`numbering.numbering_digest`)."""


@dataclass(frozen=True, kw_only=True)
class SetPosition:
    """Where a set of samples is in its epochs: one source of a stream with weights, or all sources of another one."""

    epoch: int
    """The epoch that is under way, from 0."""
    taken: int
    """Samples taken of the set that `key` shuffles."""
    key: tuple[str | int, ...]
    """With the run's seed, of the permutation of what the epoch had left when the data last changed."""
    unseen: tuple[Any, ...] | None = None
    """What the epoch had left then (`unseen.to_nodes`); None is all samples of the set."""
    num_unseen: int | None = None
    """Samples in `unseen`."""


@dataclass(frozen=True, kw_only=True)
class ParkedSource:
    """A source that was taken out of the config, with what its epoch had left: it may come back."""

    source: SourcePosition
    epoch: int
    unseen: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class StreamPosition:
    """Where a stream is; plain data that no layout of ranks changes."""

    stream: str
    seed: int
    """The run's seed, which shuffles the epochs."""
    samples_per_step: int
    weights: tuple[float, ...] | None
    """Of the sources; None if they form one set."""
    turns: int
    """Samples taken since the weights were last changed."""
    sources: tuple[SourcePosition, ...]
    """In the order of the config, which numbers the stream's samples through."""
    sets: tuple[SetPosition, ...]
    """One for each source if there are weights, else one."""
    parked: tuple[ParkedSource, ...] = ()
    """Sources that are no longer in the config."""
    next_id: int
    """Id of the next new source."""
    blocks: tuple[int, int] | None = None
    """Samples of a block and blocks of a window (`permutation.BlockPermutation`); None shuffles an epoch as a whole."""
    changes: int = 0
    """How often the data were changed between two starts."""

    @property
    def total(self) -> int:
        """Samples of the stream."""
        return sum(source.size for source in self.sources)

    def base_key(self, number: int) -> tuple[str | int, ...]:
        """The key of a set's shuffles, but for the epoch: sets of one size are not shuffled alike."""
        key = (self.stream,) if self.weights is None else (self.stream, number)
        return key if self.blocks is None else (*key, block_key(*self.blocks))

    def set_bounds(self, number: int) -> tuple[int, int]:
        """First number in the stream of a set's samples, and one past the last."""
        if self.weights is None:
            return 0, self.total
        start = sum(source.size for source in self.sources[:number])
        return start, start + self.sources[number].size

    def bounds(self, source_id: int) -> tuple[int, int]:
        """See `unseen.Bounds`."""
        start = 0
        for source in self.sources:
            if source.id == source_id:
                return start, start + source.size
            start += source.size
        return gone_bounds(source_id)

    def unseen(self, number: int) -> Unseen | None:
        """What a set's epoch had left when the data last changed; None is all."""
        nodes = self.sets[number].unseen
        return None if nodes is None else from_nodes(nodes, self.bounds)

    def fresh_set(self, number: int, epoch: int) -> SetPosition:
        """A set at the beginning of an epoch."""
        return SetPosition(epoch=epoch, taken=0, key=(*self.base_key(number), epoch))

    def advanced(self, samples: int) -> "StreamPosition":
        """The position after as many more samples."""
        if samples == 0:
            return self
        if self.weights is None:
            moves = [samples]
        else:
            before, after = (turns_taken(self.weights, turns) for turns in (self.turns, self.turns + samples))
            moves = [last - first for first, last in zip(before, after, strict=True)]
        sets = tuple(self._moved(number, move) for number, move in enumerate(moves))
        return dataclasses.replace(self, turns=self.turns + samples, sets=sets)

    def _moved(self, number: int, samples: int) -> SetPosition:
        position = self.sets[number]
        first, last = self.set_bounds(number)
        left = (last - first if position.num_unseen is None else position.num_unseen) - position.taken
        if samples < left:
            return dataclasses.replace(position, taken=position.taken + samples)
        epochs, taken = divmod(samples - left, last - first)
        return dataclasses.replace(self.fresh_set(number, position.epoch + 1 + epochs), taken=taken)

    def to_json(self) -> dict[str, Any]:
        """The position as a JSON object, without the stream's name."""
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
    """The position before the first sample. The ids of the sources must be 0, 1, 2, ... in their order."""
    position = StreamPosition(
        stream=stream,
        seed=seed,
        samples_per_step=samples_per_step,
        weights=None if weights is None else tuple(weights),
        turns=0,
        sources=tuple(sources),
        sets=(),
        next_id=len(sources),
        blocks=blocks,
    )
    sets = tuple(position.fresh_set(number, 0) for number in range(1 if weights is None else len(sources)))
    return dataclasses.replace(position, sets=sets)


def position_from_json(stream: str, content: Mapping[str, Any]) -> StreamPosition:
    """Reads what `StreamPosition.to_json` wrote."""
    fields = dict(content)
    fields["weights"] = None if fields["weights"] is None else tuple(fields["weights"])
    fields["blocks"] = None if fields.get("blocks") is None else tuple(fields["blocks"])
    fields["sources"] = tuple(SourcePosition(**source) for source in fields["sources"])
    fields["sets"] = tuple(_set_from_json(position) for position in fields["sets"])
    fields["parked"] = tuple(
        ParkedSource(source=SourcePosition(**parked["source"]), epoch=parked["epoch"], unseen=tuple(parked["unseen"]))
        for parked in fields["parked"]
    )
    return StreamPosition(stream=stream, **fields)


def _set_from_json(content: Mapping[str, Any]) -> SetPosition:
    unseen = content["unseen"]
    return SetPosition(
        epoch=content["epoch"],
        taken=content["taken"],
        key=tuple(content["key"]),
        unseen=None if unseen is None else tuple(unseen),
        num_unseen=content["num_unseen"],
    )
