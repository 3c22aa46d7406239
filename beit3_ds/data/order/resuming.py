"""Resumes a stream of samples from the position in a checkpoint, even if data or settings have changed.

The current epoch continues with its unused samples and with samples that were appended to sources, so no sample is used
twice in an epoch. A source in which samples were inserted, removed or reordered skips the rest of the current epoch.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from beit3_ds.data.order.positions import RemovedSource, SetPosition, StreamPosition, start_position
from beit3_ds.data.order.remaining import Joined, Range, RemainingSamples, Rest, SourceSubset, from_nodes, to_nodes
from beit3_ds.data.order.source_matching import FoundSource, SourceMatch, describe_changes, match_sources, same_weights

_MAX_CHANGES = 100
"""Maximum number of times per epoch that a run may resume with changed data and still continue the epoch. At the next
change, a new epoch starts, because every change makes looking up a sample slower."""


class Continued(NamedTuple):
    """Holds the position of a resumed stream, adapted to the current sources."""

    position: StreamPosition
    changes: list[str]
    """One line of text per change; empty if nothing changed."""


def new_position(
    stream: str,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    sources: Sequence[FoundSource],
    first_epoch: int = 0,
    blocks: tuple[int, int] | None = None,
) -> StreamPosition:
    """Builds the position of a stream at the start of `first_epoch`.

    Args:
        stream: name of the stream: "images", "pairs" or "texts".
        seed: the run's seed.
        samples_per_step: samples of the stream per step.
        weights: sampling weights of the sources; None if the sources form one set.
        sources: sources that the run found, in the order of the config.
        first_epoch: epoch at which the stream starts.
        blocks: samples per block and blocks per window; None shuffles each epoch as a whole.
    """
    described = [source.describe(index) for index, source in enumerate(sources)]
    position = start_position(stream, seed, samples_per_step, weights, described, blocks)
    sets = tuple(position.start_epoch(set_index, first_epoch) for set_index in range(len(position.sets)))
    return dataclasses.replace(position, sets=sets)


def continue_stream(
    stored: StreamPosition,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    sources: Sequence[FoundSource],
    blocks: tuple[int, int] | None = None,
) -> Continued:
    """Adapts the stored position of a stream to the run's settings and sources.

    If the sources, weights and seed are unchanged, the stream continues as if it had never stopped. Otherwise, each
    changed set of samples (`SetPosition`) continues its epoch with its unused samples and appended samples, in a new
    random order. However, a source in which samples were inserted, removed or reordered skips the rest of the epoch.
    Changed `blocks` take effect when samples are next shuffled.

    Args:
        stored: position from the checkpoint.
        seed: the run's seed.
        samples_per_step: samples of the stream per step.
        weights: sampling weights of the sources; None if the sources form one set.
        sources: sources that the run found, in the order of the config.
        blocks: samples per block and blocks per window; None shuffles each epoch as a whole.
    """
    matched = match_sources(stored, sources)
    changes = describe_changes(stored, seed, samples_per_step, weights, matched)
    same_sources = [m.kind == "same" and m.id == old.id for m, old in zip(matched, stored.sources, strict=False)]
    if (
        len(matched) == len(stored.sources)
        and all(same_sources)
        and seed == stored.seed
        and same_weights(weights, stored.weights)
    ):
        described = tuple(
            dataclasses.replace(old, path=m.found.path) for m, old in zip(matched, stored.sources, strict=True)
        )
        same = dataclasses.replace(stored, samples_per_step=samples_per_step, sources=described, blocks=blocks)
        return Continued(same, changes)
    return Continued(_Continuation(stored, seed, samples_per_step, weights, matched, blocks).position(changes), changes)


class _Continuation:
    """Builds the position from which a stream continues, if its data have changed since the checkpoint."""

    def __init__(
        self,
        stored: StreamPosition,
        seed: int,
        samples_per_step: int,
        weights: Sequence[float] | None,
        matched: Sequence[SourceMatch],
        blocks: tuple[int, int] | None,
    ) -> None:
        self._stored, self._matched, self._weights = stored, matched, weights
        self._kept = {match.id for match in matched}
        self._set_index = {source.id: index for index, source in enumerate(stored.sources)}
        self._now = StreamPosition(
            stream=stored.stream,
            seed=seed,
            samples_per_step=samples_per_step,
            weights=None if weights is None else tuple(weights),
            mixture_position=stored.mixture_position if self._keeps_mixture() else 0,
            sources=tuple(match.found.describe(match.id) for match in matched),
            sets=(),
            next_id=max([stored.next_id, *(match.id + 1 for match in matched)]),
            blocks=blocks,
            changes=stored.changes + 1,
        )

    def position(self, changes: list[str]) -> StreamPosition:
        """Returns the new position; appends a line to `changes` for each epoch that ends early."""
        if self._weights is None:
            sets = [self._join_all()]
        else:
            sets = [self._continue_source(set_index, match) for set_index, match in enumerate(self._matched)]
        for set_index, one in enumerate(sets):
            if one.remaining is not None and sum(node[0] == "rest" for node in one.remaining) > _MAX_CHANGES:
                sets[set_index] = self._now.start_epoch(set_index, one.epoch + 1)
                changes.append(
                    f"data.{self._stored.stream}: epoch {one.epoch} was changed {_MAX_CHANGES} times and ends here; "
                    "repeats cannot be excluded"
                )
        return dataclasses.replace(self._now, sets=tuple(sets), removed=self._keep_removed())

    def _keeps_mixture(self) -> bool:
        """Returns whether the stream has source weights, and its weights and source ids are as in the checkpoint."""
        return (
            same_weights(self._weights, self._stored.weights)
            and self._weights is not None
            and [match.id for match in self._matched] == [source.id for source in self._stored.sources]
        )

    def _continue_source(self, set_index: int, match: SourceMatch) -> SetPosition:
        """Returns the new position of one source of a stream with weights.

        Args:
            set_index: index of the source's set in `StreamPosition.sets`.
            match: the source, and the matching source in the checkpoint, if there is one.
        """
        if match.kind == "renumbered" and match.before is not None:
            return self._now.start_epoch(set_index, self._epoch(match.before.id) + 1)
        if match.kind == "new" or match.before is None:
            return self._now.start_epoch(set_index, 0)
        old_index = self._set_index.get(match.id)
        if match.kind == "same" and self._stored.weights is not None and old_index is not None:
            old = self._stored.sets[old_index]
            if self._now.seed == self._stored.seed:
                return old
            if old.remaining is None and old.taken == 0:
                return self._now.start_epoch(set_index, old.epoch)
        return self._shuffle(set_index, self._epoch(match.id), [self._remaining_of(match), *self._growth(match)])

    def _join_all(self) -> SetPosition:
        """Joins the unused samples of all sources in a new random order, and returns the position at the start of this
        order.

        Used if the stream has no source weights.
        """
        known = [match for match in self._matched if match.kind in ("same", "grown")]
        gone = [match for match in self._matched if match.kind == "renumbered" and match.before is not None]
        epochs = [self._epoch(match.id) for match in known]
        epochs += [self._epoch(match.before.id) for match in gone if match.before is not None]
        epochs += [one.epoch for one in self._stored.sets if self._stored.weights is None]
        parts: list[RemainingSamples] = []
        if self._stored.weights is None:
            ids = [match.id for match in known if match.id in self._set_index]
            if ids:
                parts.append(self._remaining_of_set(ids))
            parts += [self._remaining_of(match) for match in known if match.id not in self._set_index]
        else:
            parts += [self._remaining_of(match) for match in known]
        parts += [part for match in known for part in self._growth(match)]
        parts += [self._range(match, 0) for match in self._matched if match.kind == "new"]
        return self._shuffle(0, max(epochs, default=0), parts)

    def _shuffle(self, set_index: int, epoch: int, parts: Sequence[RemainingSamples]) -> SetPosition:
        """Returns the position of a set of samples whose epoch continues with `parts` in a new random order.

        If `parts` contain no samples, the next epoch starts.

        Args:
            set_index: index of the set in `StreamPosition.sets`.
            epoch: the epoch, from 0.
            parts: samples for the rest of the epoch.
        """
        parts = [part for part in parts if len(part)]
        if not parts:
            return self._now.start_epoch(set_index, epoch + 1)
        left = parts[0] if len(parts) == 1 else Joined(parts)
        key = (*self._now.base_key(set_index), epoch, "left", self._now.changes)
        return SetPosition(epoch=epoch, taken=0, key=key, remaining=tuple(to_nodes(left)), num_remaining=len(left))

    def _epoch(self, source_id: int) -> int:
        for entry in self._stored.removed:
            if entry.source.id == source_id:
                return entry.epoch
        return self._stored.sets[0 if self._stored.weights is None else self._set_index[source_id]].epoch

    def _remaining_of(self, match: SourceMatch) -> RemainingSamples:
        """Returns the unused samples of a source's current epoch, except samples added since the checkpoint."""
        for entry in self._stored.removed:
            if entry.source.id == match.id:
                return from_nodes(entry.remaining, self._now.bounds)
        return self._remaining_of_set([match.id])

    def _remaining_of_set(self, ids: Sequence[int]) -> RemainingSamples:
        """Returns those samples of the sources `ids` that are unused in the checkpoint's current epoch.

        If the checkpoint's stream has sampling weights, each source has its own epoch, so `ids` must contain one source
        only.
        """
        stored = self._stored
        set_index = 0 if stored.weights is None else self._set_index[ids[0]]
        old = stored.sets[set_index]
        members = stored.sources if stored.weights is None else stored.sources[set_index : set_index + 1]
        whole: RemainingSamples
        if old.remaining is not None:
            whole = from_nodes(old.remaining, self._now.bounds)
        else:
            whole = Joined([Range(m.id, 0, m.size, self._now.bounds(m.id)[0]) for m in members])
        left: RemainingSamples = Rest(whole, stored.seed, old.key, old.taken) if old.taken else whole
        if {member.id for member in members} <= set(ids):
            return left
        return SourceSubset(left, tuple(ids), tuple(self._now.bounds(one) for one in ids))

    def _growth(self, match: SourceMatch) -> list[RemainingSamples]:
        assert match.before is not None, "a new source cannot have grown"
        return [self._range(match, match.before.size)] if match.kind == "grown" else []

    def _range(self, match: SourceMatch, first: int) -> RemainingSamples:
        return Range(match.id, first, match.found.size, self._now.bounds(match.id)[0])

    def _keep_removed(self) -> tuple[RemovedSource, ...]:
        """Returns the sources that were removed from the config, with the unused samples of their epochs."""
        replaced = {match.before.id for match in self._matched if match.before is not None}
        removed = [entry for entry in self._stored.removed if entry.source.id not in replaced]
        for source in self._stored.sources:
            if source.id not in self._kept | replaced:
                left = to_nodes(self._remaining_of_set([source.id]))
                removed.append(RemovedSource(source=source, epoch=self._epoch(source.id), remaining=tuple(left)))
        return tuple(removed)
