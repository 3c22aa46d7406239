"""Reads the position of a stream from a checkpoint; checks every value, because people can edit checkpoints."""

import math
from collections.abc import Mapping
from typing import Any

from beit3_ds.data.order.positions import RemovedSource, SetPosition, SourcePosition, StreamPosition
from beit3_ds.untrusted_json import check_count, check_list, check_object, check_text

_OLD_NAMES = {
    "turns": "mixture_position",
    "unseen": "remaining",
    "num_unseen": "num_remaining",
    "parked": "removed",
}
"""Maps field names in checkpoints of versions before 0.2 to the current field names."""

_MOST_SAMPLES = 1 << 40
_MOST_TAKEN = 1 << 60
_MOST_NODES = 10_000
_MOST_IDS = 1 << 20  # the numbers of a removed source's samples follow from its id and have to fit in 64 bits


def position_from_json(stream: str, content: Mapping[str, Any]) -> StreamPosition:
    """Rebuilds the position of a stream from the JSON object that `StreamPosition.to_json` returned.

    Raises:
        ValueError: if a value has the wrong type, or values contradict each other.
        KeyError: if a value is missing.
    """
    fields = check_object(_with_current_names(content))
    sources = tuple(map(_parse_source, check_list(fields["sources"])))
    removed_sources = [_parse_source(check_object(one)["source"]) for one in check_list(fields["removed"])]
    sizes = {source.id: source.size for source in (*sources, *removed_sources)}
    if len(sizes) < len(sources) + len(removed_sources):
        raise ValueError("two sources have one id")
    weights = (
        None if fields["weights"] is None else tuple(map(_check_weight, check_list(fields["weights"], len(sources))))
    )
    spans = [sum(source.size for source in sources)] if weights is None else [source.size for source in sources]
    sets = check_list(fields["sets"], len(spans))
    blocks = None if fields.get("blocks") is None else tuple(map(_check_positive, check_list(fields["blocks"], 2)))
    next_id = check_count(fields["next_id"])
    if any(number >= next_id for number in sizes):
        raise ValueError("a source has an id that is not given yet")
    return StreamPosition(
        stream=stream,
        seed=_check_int(fields["seed"]),
        samples_per_step=_check_at_most(fields["samples_per_step"], _MOST_SAMPLES),
        weights=weights,
        mixture_position=_check_at_most(fields["mixture_position"], _MOST_TAKEN),
        sources=sources,
        sets=tuple(_parse_set(one, span, sizes) for one, span in zip(sets, spans, strict=True)),
        removed=tuple(
            RemovedSource(
                source=source,
                epoch=_check_at_most(one["epoch"], _MOST_SAMPLES),
                remaining=_check_nodes(one["remaining"], sizes)[0],
            )
            for source, one in zip(removed_sources, fields["removed"], strict=True)
        ),
        next_id=next_id,
        blocks=blocks,  # type: ignore[arg-type]
        changes=check_count(fields.get("changes", 0)),
    )


def _parse_source(content: Any) -> SourcePosition:
    content = check_object(content)
    return SourcePosition(
        id=_check_at_most(content["id"], _MOST_IDS),
        path=check_text(content["path"]),
        size=_check_at_most(content["size"], _MOST_SAMPLES),
        digest=check_text(content["digest"]),
    )


def _parse_set(content: Any, span: int, sizes: Mapping[int, int]) -> SetPosition:
    content = check_object(content)
    remaining, num_remaining = content["remaining"], content["num_remaining"]
    if remaining is not None:
        remaining, span = _check_nodes(remaining, sizes)
        if check_count(num_remaining) > span:
            raise ValueError(f"at most {span} samples remain, not {num_remaining}")
    elif num_remaining is not None:
        raise ValueError("it counts samples that it does not list")
    limit = span if num_remaining is None else num_remaining
    return SetPosition(
        epoch=_check_at_most(content["epoch"], _MOST_SAMPLES),
        taken=_check_at_most(content["taken"], limit),
        key=_check_key(content["key"]),
        remaining=remaining,
        num_remaining=num_remaining,
    )


def _check_nodes(value: Any, sizes: Mapping[int, int]) -> tuple[tuple[Any, ...], int]:
    """Checks the JSON descriptions of a set of unused samples, as `remaining.to_nodes` returns them.

    Args:
        value: list of descriptions. The last one describes the set of unused samples. Each of the others describes a
            set from which a set further down in the list is made.
        sizes: number of samples of each source, by the source's id.

    Returns:
        The checked list as a tuple, and an upper bound on the number of samples in the set. The exact number is unknown
        if the set was made by removing the samples of some sources from another set.
    """
    nodes = check_list(value)
    if not 1 <= len(nodes) <= _MOST_NODES:
        raise ValueError(f"{len(nodes)} nodes of remaining samples")
    lengths: list[int] = []
    unused: set[int] = set()
    for number, node in enumerate(nodes):
        parts, length = _check_node(node, lengths, sizes)
        if not unused.issuperset(parts) or len(set(parts)) < len(parts):
            raise ValueError("a set of remaining samples is used twice, or before it is defined")
        unused.difference_update(parts)
        unused.add(number)
        lengths.append(length)
    return tuple(nodes), lengths[-1]


def _check_node(node: Any, lengths: list[int], sizes: Mapping[int, int]) -> tuple[list[int], int]:
    """Checks the JSON description of one set of samples in a list of descriptions.

    A set is a range of a source's samples, or is made from sets that are described earlier in the list.

    Args:
        node: the description.
        lengths: upper bound on the number of samples of each set that is described earlier in the list.
        sizes: number of samples of each source, by the source's id.

    Returns:
        Indices, in the list, of the sets from which this set is made, and an upper bound on the number of samples in
        this set.
    """
    kind, *values = check_list(node)
    if kind == "range":
        source, first, last = map(check_count, check_list(values, 3))
        _check_at_most(source, _MOST_IDS)
        # A renumbered source gets a new id; no source of the stream contains the unused samples of its old id.
        if not first <= last <= sizes.get(source, _MOST_SAMPLES):
            raise ValueError(f"source {source} has no samples {first} to {last}")
        return [], last - first
    if kind == "joined":
        parts = [_check_part(part, lengths) for part in check_list(check_list(values, 1)[0])]
        if not parts:
            raise ValueError("nothing is joined")
        return parts, sum(lengths[part] for part in parts)
    if kind == "rest":
        part, seed, key, taken = check_list(values, 4)
        _check_part(part, lengths), _check_int(seed), _check_key(key)
        return [part], lengths[part] - _check_at_most(taken, lengths[part])
    if kind == "only":
        part, sources = check_list(values, 2)
        for source in check_list(sources):
            _check_at_most(source, _MOST_IDS)
        return [part], lengths[_check_part(part, lengths)]
    raise ValueError(f"unknown kind of set: {str(kind)[:20]!r}")


def _check_part(value: Any, lengths: list[int]) -> int:
    return _check_at_most(value, len(lengths) - 1)


def _check_key(value: Any) -> tuple[str | int, ...]:
    return tuple(part if isinstance(part, str) else _check_int(part) for part in check_list(value))


def _check_int(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{str(value)[:40]!r} is not an integer")
    return value


def _check_positive(value: Any) -> int:
    if not 1 <= _check_int(value) <= _MOST_SAMPLES:
        raise ValueError(f"{value} is not a number of samples")
    return int(value)


def _check_at_most(value: Any, limit: int) -> int:
    if check_count(value) > limit:
        raise ValueError(f"{value} is more than {limit}")
    return int(value)


def _check_weight(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise ValueError(f"{str(value)[:40]!r} is not a weight")
    return float(value)


def _with_current_names(content: Any) -> Any:
    if isinstance(content, dict):
        return {_OLD_NAMES.get(name, name): _with_current_names(value) for name, value in content.items()}
    return [_with_current_names(value) for value in content] if isinstance(content, list | tuple) else content
