"""Matches the sources of a resumed run with the sources in a checkpoint, and describes the changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from beit3_ds.data.order.mixture import mixture_shares
from beit3_ds.data.order.positions import RemovedSource, SourcePosition, StreamPosition


@dataclass(frozen=True, kw_only=True)
class FoundSource:
    """Describes a data source as a run found it at the start."""

    path: str
    """Path of the source in the config."""
    size: int
    """Number of samples in the source."""
    digest: Callable[[int], str]
    """Function that maps n to the digest of the first n samples (`prefix_digest.prefix_digest`)."""

    def describe(self, source_id: int) -> SourcePosition:
        """Returns a description of this source for a checkpoint.

        Args:
            source_id: id of the source in the stream.
        """
        return SourcePosition(id=source_id, path=self.path, size=self.size, digest=self.digest(self.size))


class SourceMatch(NamedTuple):
    """Holds a source that the run found, and the matching source in the checkpoint, if there is one."""

    found: FoundSource
    id: int
    """Id of the source in the stream: the stored id if `kind` is `same` or `grown`, otherwise a new id."""
    kind: str
    """Result of the comparison: `same`, `grown` (at its end), `renumbered` (samples inserted or removed) or `new`."""
    before: SourcePosition | None
    """The source as the checkpoint describes it; None if the source is new."""
    removed: RemovedSource | None
    """The source's entry in `StreamPosition.removed` of the checkpoint; None if there is no such entry. The entry shows
    that the source was removed from the config in an earlier run. The config now has the source again."""


def match_sources(stored: StreamPosition, sources: Sequence[FoundSource]) -> list[SourceMatch]:
    """Finds, for each source of the run, the same source in the checkpoint: by the path or, if it was moved, by the
    content.

    The search by path includes the sources that an earlier run removed from the config (`StreamPosition.removed`). If
    no source in the checkpoint has the path, the source may have been moved. It is then matched with a source in the
    checkpoint that has the same size and digest, and whose path is no longer in the config. Without such a match, the
    source is new.

    Args:
        stored: position from the checkpoint.
        sources: sources that the run found, in the order of the config.
    """
    by_path = {source.path: source for source in stored.sources}
    removed = {entry.source.path: entry for entry in stored.removed}
    paths = {source.path for source in sources}
    moved = [source for source in stored.sources if source.path not in paths]
    matched, next_id = [], stored.next_id
    for found in sources:
        entry = removed.get(found.path) if found.path not in by_path else None
        before = by_path.get(found.path) or (entry.source if entry else None)
        if before is None:
            digest = found.digest(found.size)
            before = next((old for old in moved if (old.size, old.digest) == (found.size, digest)), None)
            moved = [old for old in moved if old is not before]
        kind = "new" if before is None else _compare(found, before)
        is_known = before is not None and kind in ("same", "grown")
        matched.append(SourceMatch(found, before.id if before and is_known else next_id, kind, before, entry))
        next_id += not is_known
    return matched


def _compare(found: FoundSource, before: SourcePosition) -> str:
    if found.size < before.size or found.digest(before.size) != before.digest:
        return "renumbered"
    return "same" if found.size == before.size else "grown"


def same_weights(weights: Sequence[float] | None, before: Sequence[float] | None) -> bool:
    """Returns whether each source has the same share of the stream under both lists of weights. None means a stream
    without weights. Two such streams count as equal; a stream with weights and one without do not.
    """
    if weights is None or before is None:
        return weights is before is None
    return mixture_shares(weights) == mixture_shares(before)


def describe_changes(
    stored: StreamPosition,
    seed: int,
    samples_per_step: int,
    weights: Sequence[float] | None,
    matched: Sequence[SourceMatch],
) -> list[str]:
    """Describes the differences between a checkpoint's position and the run's settings and sources, one line each."""
    lines = []
    if samples_per_step != stored.samples_per_step:
        lines.append(f"samples_per_step {stored.samples_per_step} -> {samples_per_step}: every source continues there")
    if seed != stored.seed:
        lines.append(f"training.seed {stored.seed} -> {seed}: the rest of the epoch is reshuffled")
    if not same_weights(weights, stored.weights):
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


def _describe_source(match: SourceMatch) -> str | None:
    path, before = match.found.path, match.before
    if before is None:
        return f"source '{path}' is new, with {match.found.size} samples"
    if match.kind == "renumbered":
        return (
            f"source '{path}' has {match.found.size} samples instead of {before.size}, which are numbered differently: "
            "it skips the rest of the current epoch, and repeats of samples from this epoch cannot be excluded"
        )
    if match.kind == "grown":
        new = match.found.size - before.size
        return (
            f"source '{path}' grew from {before.size} to {match.found.size} samples: the {new} new ones join its epoch"
        )
    if match.removed is not None:
        return f"source '{path}' is back and continues where it was"
    return f"source '{before.path}' is now '{path}'" if path != before.path else None


def _show(weights: Sequence[float] | None) -> str:
    return "by size" if weights is None else ":".join(f"{weight:g}" for weight in weights)
