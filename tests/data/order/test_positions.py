"""Tests that positions in a stream are stored, read and resumed, also with block order."""

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.order.positions import StreamPosition
from beit3_ds.data.order.resuming import continue_stream, new_position
from beit3_ds.data.order.source_matching import FoundSource
from beit3_ds.data.order.stored_position import position_from_json
from beit3_ds.data.order.stream import StreamOrder


def found(sizes: list[int]) -> list[FoundSource]:
    return [FoundSource(path=str(i), size=size, digest=lambda count, i=i: f"{i}") for i, size in enumerate(sizes)]


def position(sizes: list[int], blocks: tuple[int, int] | None, weights: Any = None) -> StreamPosition:
    return new_position("images", 3, 4, weights, found(sizes), blocks=blocks)


def samples(start: StreamPosition, first: int, count: int) -> list[tuple[int, int]]:
    epochs, numbers = StreamOrder(start)(np.arange(first, first + count))
    return list(zip(epochs.tolist(), numbers.tolist(), strict=True))


@given(st.lists(st.integers(3, 60), min_size=1, max_size=3), st.integers(0, 200), st.integers(1, 80), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stored_position_continues(sizes: list[int], first: int, count: int, weighted: bool) -> None:
    weights = [1.0 + i for i in range(len(sizes))] if weighted else None
    start = position(sizes, (7, 2), weights)
    stored = position_from_json("images", json.loads(json.dumps(start.advanced(first).to_json())))
    assert samples(stored, 0, count) == samples(start, first, count)


@pytest.mark.parametrize(("before", "after"), [(None, (7, 2)), ((7, 2), None), ((7, 2), (5, 3))])
def test_another_order_begins_with_the_next_epoch(before: Any, after: Any) -> None:
    start = position([50], before)
    stored = start.advanced(20)
    continued, _ = continue_stream(stored, 3, 4, None, found([50]), after)
    epoch = [number for _, number in [*samples(start, 0, 20), *samples(continued, 0, 30)]]
    assert sorted(epoch) == list(range(50))  # catches samples seen twice after a change of data.order
    assert samples(continued, 30, 50) == samples(position([50], after), 50, 50)


def test_a_grown_source_continues_without_repeats() -> None:
    start = position([50], (7, 2))
    continued, _ = continue_stream(start.advanced(20), 3, 4, None, found([64]), (7, 2))
    seen = [number for _, number in samples(start, 0, 20)]
    assert sorted([*seen, *(number for _, number in samples(continued, 0, 44))]) == list(range(64))


def test_a_position_under_the_old_names_is_the_same() -> None:
    weights = [1.0, 2.0]
    start = position([20, 30], None, weights).advanced(10)
    changed, _ = continue_stream(start, 3, 4, weights, found([20, 34]))
    removed, _ = continue_stream(changed, 3, 4, [1.0], found([20]))
    now = json.dumps(removed.to_json())
    names = {"mixture_position": "turns", "num_remaining": "num_unseen", "remaining": "unseen", "removed": "parked"}
    old = now
    for name, old_name in names.items():
        assert f'"{name}"' in now
        old = old.replace(f'"{name}"', f'"{old_name}"')
    # catches a checkpoint of an earlier version that no longer resumes
    assert position_from_json("images", json.loads(old)) == position_from_json("images", json.loads(now)) == removed
