"""Tests sets of remaining samples: each sample once, unchanged by a round trip through JSON."""

import json

import numpy as np

from beit3_ds.data.order.remaining import (
    Joined,
    Range,
    RemainingSamples,
    Rest,
    SourceSubset,
    from_nodes,
    gone_bounds,
    to_nodes,
)

BOUNDS = {0: (0, 50), 1: (50, 400)}


def _all(remaining: RemainingSamples) -> list[int]:
    found: list[int] = remaining(np.arange(len(remaining))).tolist()
    return found


def test_the_rest_of_a_shuffled_set_is_what_was_not_taken() -> None:
    whole = Joined([Range(0, 0, 50, 0), Range(1, 0, 350, 50)])
    rest = Rest(whole, 7, ("images", 0), 120)
    shuffled = _all(Rest(whole, 7, ("images", 0), 0))
    assert sorted(shuffled) == list(range(400))
    assert _all(rest) == shuffled[120:]  # catches a rest that is shuffled by its own size


def test_one_source_of_a_set_keeps_its_order() -> None:
    rest = Rest(Joined([Range(0, 0, 50, 0), Range(1, 0, 350, 50)]), 7, ("images", 0), 120)
    only = SourceSubset(rest, (1,), (BOUNDS[1],))
    assert _all(only) == [number for number in _all(rest) if number >= 50]
    places = np.array([len(only) - 1, 0, 130, 3])  # catches an answer that depends on the order of the question
    assert only(places).tolist() == [_all(only)[place] for place in places]


def test_sets_are_rebuilt_in_a_stream_that_is_numbered_differently() -> None:
    only = SourceSubset(Rest(Joined([Range(0, 3, 50, 0), Range(1, 0, 350, 50)]), 7, ("a", 0), 10), (1,), (BOUNDS[1],))
    nodes = json.loads(json.dumps(to_nodes(only)))
    assert _all(from_nodes(nodes, BOUNDS.__getitem__)) == _all(only)
    moved = {0: gone_bounds(0), 1: (0, 350)}  # source 0 was removed, so source 1 comes first
    assert _all(from_nodes(nodes, moved.__getitem__)) == [number - 50 for number in _all(only)]
