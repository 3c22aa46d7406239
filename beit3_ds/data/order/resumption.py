"""Continues a stream whose sources, weights, seed or batch may have changed since its position was stored.

No sample comes twice in an epoch: the rest of the epoch continues, joined with new samples. Sources are matched by
path, or else by content. If the samples of a source are numbered differently than before, nothing tells which ones were
seen, so the source begins its next epoch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.data.order.positions import ParkedSource, SetPosition, SourcePosition, StreamPosition, start_position
from beit3_ds.data.order.turns import share_parts
from beit3_ds.data.order.unseen import Joined, Only, Range, Rest, Unseen, from_nodes, to_nodes

_MAX_CHANGES = 100
"""Changes within one epoch after which it ends; each one slows finding a sample and enlarges the checkpoint's entry."""


@dataclass(frozen=True, kw_only=True)
class FoundSource:
    """A source as the run finds it at its start."""

    path: str
    """Path in the config."""
    size: int
    """Samples."""
    digest: Callable[[int], str]
    """Returns the digest of the numbers of a given count of first samples (`numbering.numbering_digest`)."""

    def describe(self, source_id: int) -> SourcePosition:
        """Returns the source as a checkpoint stores it."""
        return SourcePosition(id=source_id, path=self.path, size=self.size, digest=self.digest(self.size))


class Continued(NamedTuple):
    """A stream's position in the data that the run found."""

    position: StreamPosition
    changes: list[str]
    """One line per change; empty if nothing changed."""


def new_position(
    stream: str,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    sources: Sequence[FoundSource],
    first_epoch: int = 0,
    blocks: tuple[int, int] | None = None,
) -> StreamPosition:
    """Returns the position of a stream before its first sample."""
    described = [source.describe(number) for number, source in enumerate(sources)]
    position = start_position(stream, seed, samples_per_step, weights, described, blocks)
    sets = tuple(position.fresh_set(number, first_epoch) for number in range(len(position.sets)))
    return dataclasses.replace(position, sets=sets)


def continue_stream(
    stored: StreamPosition,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    sources: Sequence[FoundSource],
    blocks: tuple[int, int] | None = None,
) -> Continued:
    """Continues a stored position with the run's settings and the sources that it finds.

    Without a change, or if only `samples_per_step` changed, the position stays the same, so the stream continues as if
    it had never stopped. Changed `blocks` apply from the next epoch on; the current one keeps its order.
    """
    matched = _match(stored, sources)
    changes = _describe_changes(stored, seed, samples_per_step, weights, matched)
    same_sources = [m.kind == "same" and m.id == old.id for m, old in zip(matched, stored.sources, strict=False)]
    if (
        len(matched) == len(stored.sources)
        and all(same_sources)
        and seed == stored.seed
        and _same_weights(weights, stored.weights)
    ):
        described = tuple(
            dataclasses.replace(old, path=m.found.path) for m, old in zip(matched, stored.sources, strict=True)
        )
        same = dataclasses.replace(stored, samples_per_step=samples_per_step, sources=described, blocks=blocks)
        return Continued(same, changes)
    return Continued(_Continuation(stored, seed, samples_per_step, weights, matched, blocks).position(changes), changes)


class _Match(NamedTuple):
    """A source that was found, and the same source when the position was stored."""

    found: FoundSource
    id: int
    kind: str
    """`same`, `grown`, `renumbered` or `new`."""
    before: SourcePosition | None
    parked: ParkedSource | None


def _match(stored: StreamPosition, sources: Sequence[FoundSource]) -> list[_Match]:
    by_path = {source.path: source for source in stored.sources}
    parked = {entry.source.path: entry for entry in stored.parked}
    paths = {source.path for source in sources}
    moved = [source for source in stored.sources if source.path not in paths]
    matched, next_id = [], stored.next_id
    for found in sources:
        entry = parked.get(found.path) if found.path not in by_path else None
        before = by_path.get(found.path) or (entry.source if entry else None)
        if before is None:
            digest = found.digest(found.size)
            before = next((old for old in moved if (old.size, old.digest) == (found.size, digest)), None)
            moved = [old for old in moved if old is not before]
        kind = "new" if before is None else _compare(found, before)
        is_known = before is not None and kind in ("same", "grown")
        matched.append(_Match(found, before.id if before and is_known else next_id, kind, before, entry))
        next_id += not is_known
    return matched


def _compare(found: FoundSource, before: SourcePosition) -> str:
    if found.size < before.size or found.digest(before.size) != before.digest:
        return "renumbered"
    return "same" if found.size == before.size else "grown"


def _same_weights(weights: Sequence[float] | None, before: Sequence[float] | None) -> bool:
    if weights is None or before is None:
        return weights is before is None
    return share_parts(weights) == share_parts(before)


class _Continuation:
    """Builds the position of a stream after its data were changed."""

    def __init__(
        self,
        stored: StreamPosition,
        seed: int,
        samples_per_step: int,
        weights: Sequence[float] | None,
        matched: Sequence[_Match],
        blocks: tuple[int, int] | None,
    ) -> None:
        self._stored, self._matched, self._weights = stored, matched, weights
        self._kept = {match.id for match in matched}
        self._number = {source.id: number for number, source in enumerate(stored.sources)}
        self._now = StreamPosition(
            stream=stored.stream,
            seed=seed,
            samples_per_step=samples_per_step,
            weights=None if weights is None else tuple(weights),
            turns=stored.turns if self._keeps_turns() else 0,
            sources=tuple(match.found.describe(match.id) for match in matched),
            sets=(),
            next_id=max([stored.next_id, *(match.id + 1 for match in matched)]),
            blocks=blocks,
            changes=stored.changes + 1,
        )

    def position(self, changes: list[str]) -> StreamPosition:
        """Returns the stream's position now; appends a line to `changes` for each epoch that had to end."""
        if self._weights is None:
            sets = [self._join_all()]
        else:
            sets = [self._continue_source(number, match) for number, match in enumerate(self._matched)]
        for number, one in enumerate(sets):
            if one.unseen is not None and sum(node[0] == "rest" for node in one.unseen) > _MAX_CHANGES:
                sets[number] = self._now.fresh_set(number, one.epoch + 1)
                changes.append(
                    f"data.{self._stored.stream}: epoch {one.epoch} was changed {_MAX_CHANGES} times and ends here; "
                    "repeats cannot be excluded"
                )
        return dataclasses.replace(self._now, sets=tuple(sets), parked=self._park())

    def _keeps_turns(self) -> bool:
        """Returns whether the sources still take turns as before."""
        return (
            _same_weights(self._weights, self._stored.weights)
            and self._weights is not None
            and [match.id for match in self._matched] == [source.id for source in self._stored.sources]
        )

    def _continue_source(self, number: int, match: _Match) -> SetPosition:
        """Returns the set of one source of a stream with weights."""
        if match.kind == "renumbered" and match.before is not None:
            return self._now.fresh_set(number, self._epoch(match.before.id) + 1)
        if match.kind == "new" or match.before is None:
            return self._now.fresh_set(number, 0)
        old_number = self._number.get(match.id)
        if match.kind == "same" and self._stored.weights is not None and old_number is not None:
            old = self._stored.sets[old_number]
            if self._now.seed == self._stored.seed:
                return old
            if old.unseen is None and old.taken == 0:
                return self._now.fresh_set(number, old.epoch)
        return self._shuffle(number, self._epoch(match.id), [self._left_of(match), *self._growth(match)])

    def _join_all(self) -> SetPosition:
        """Returns the one set of a stream without weights."""
        known = [match for match in self._matched if match.kind in ("same", "grown")]
        gone = [match for match in self._matched if match.kind == "renumbered" and match.before is not None]
        epochs = [self._epoch(match.id) for match in known]
        epochs += [self._epoch(match.before.id) for match in gone if match.before is not None]
        epochs += [one.epoch for one in self._stored.sets if self._stored.weights is None]
        parts: list[Unseen] = []
        if self._stored.weights is None:
            ids = [match.id for match in known if match.id in self._number]
            if ids:
                parts.append(self._left_of_set(ids))
            parts += [self._left_of(match) for match in known if match.id not in self._number]
        else:
            parts += [self._left_of(match) for match in known]
        parts += [part for match in known for part in self._growth(match)]
        parts += [self._range(match, 0) for match in self._matched if match.kind == "new"]
        return self._shuffle(0, max(epochs, default=0), parts)

    def _shuffle(self, number: int, epoch: int, parts: Sequence[Unseen]) -> SetPosition:
        """Returns a set whose epoch has these samples left, or its next epoch if there are none."""
        parts = [part for part in parts if len(part)]
        if not parts:
            return self._now.fresh_set(number, epoch + 1)
        left = parts[0] if len(parts) == 1 else Joined(parts)
        key = (*self._now.base_key(number), epoch, "left", self._now.changes)
        return SetPosition(epoch=epoch, taken=0, key=key, unseen=tuple(to_nodes(left)), num_unseen=len(left))

    def _epoch(self, source_id: int) -> int:
        for entry in self._stored.parked:
            if entry.source.id == source_id:
                return entry.epoch
        return self._stored.sets[0 if self._stored.weights is None else self._number[source_id]].epoch

    def _left_of(self, match: _Match) -> Unseen:
        """Returns the samples that one source had before and that its epoch has left."""
        for entry in self._stored.parked:
            if entry.source.id == match.id:
                return from_nodes(entry.unseen, self._now.bounds)
        return self._left_of_set([match.id])

    def _left_of_set(self, ids: Sequence[int]) -> Unseen:
        """Returns the samples that the epoch has left of some sources of one stored set."""
        stored = self._stored
        number = 0 if stored.weights is None else self._number[ids[0]]
        old = stored.sets[number]
        members = stored.sources if stored.weights is None else stored.sources[number : number + 1]
        whole: Unseen
        if old.unseen is not None:
            whole = from_nodes(old.unseen, self._now.bounds)
        else:
            whole = Joined([Range(m.id, 0, m.size, self._now.bounds(m.id)[0]) for m in members])
        left: Unseen = Rest(whole, stored.seed, old.key, old.taken) if old.taken else whole
        if {member.id for member in members} <= set(ids):
            return left
        return Only(left, tuple(ids), tuple(self._now.bounds(one) for one in ids))

    def _growth(self, match: _Match) -> list[Unseen]:
        assert match.before is not None, "only what was there before grows"
        return [self._range(match, match.before.size)] if match.kind == "grown" else []

    def _range(self, match: _Match, first: int) -> Unseen:
        return Range(match.id, first, match.found.size, self._now.bounds(match.id)[0])

    def _park(self) -> tuple[ParkedSource, ...]:
        """Keeps the rest of the epoch of sources that are no longer in the config and did not return renumbered."""
        replaced = {match.before.id for match in self._matched if match.before is not None}
        parked = [entry for entry in self._stored.parked if entry.source.id not in replaced]
        for source in self._stored.sources:
            if source.id not in self._kept | replaced:
                left = to_nodes(self._left_of_set([source.id]))
                parked.append(ParkedSource(source=source, epoch=self._epoch(source.id), unseen=tuple(left)))
        return tuple(parked)


def _describe_changes(
    stored: StreamPosition,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    matched: Sequence[_Match],
) -> list[str]:
    lines = []
    if samples_per_step != stored.samples_per_step:
        lines.append(f"samples_per_step {stored.samples_per_step} -> {samples_per_step}: every source continues there")
    if seed != stored.seed:
        lines.append(f"training.seed {stored.seed} -> {seed}: the rest of the epoch is reshuffled")
    if not _same_weights(weights, stored.weights):
        lines.append(f"weights {_show(stored.weights)} -> {_show(weights)}: each source continues in its own epoch")
    lines += [line for match in matched if (line := _describe_source(match))]
    found = {match.before.id for match in matched if match.before is not None}
    lines += [
        f"source '{old.path}' is no longer in the config; the rest of its epoch is kept in case it is added again"
        for old in stored.sources
        if old.id not in found
    ]
    kept = [match.id for match in matched if match.id < stored.next_id]
    before = [old.id for old in stored.sources if old.id in kept]
    if [one for one in kept if one in before] != before:
        lines.append("the sources come in another order; each continues where it was")
    return [f"data.{stored.stream}: {line}" for line in lines]


def _describe_source(match: _Match) -> str | None:
    path, before = match.found.path, match.before
    if before is None:
        return f"source '{path}' is new, with {match.found.size} samples"
    if match.kind == "renumbered":
        return (
            f"source '{path}' has {match.found.size} samples instead of {before.size}, which are numbered differently: "
            "it begins its next epoch, and repeats of samples from the last epoch cannot be excluded"
        )
    if match.kind == "grown":
        new = match.found.size - before.size
        return (
            f"source '{path}' grew from {before.size} to {match.found.size} samples: the {new} new ones join its epoch"
        )
    if match.parked is not None:
        return f"source '{path}' is back and continues where it was"
    return f"source '{before.path}' is now '{path}'" if path != before.path else None


def _show(weights: Sequence[float] | None) -> str:
    return "by size" if weights is None else ":".join(f"{weight:g}" for weight in weights)
