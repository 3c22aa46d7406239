"""The order that visits blocks of neighbours: still every sample once per epoch, and resumable anywhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.order.permutation import BlockPermutation, block_key, order_permutation
from beit3_ds.data.order.positions import StreamPosition, position_from_json
from beit3_ds.data.order.resuming import continue_stream, new_position
from beit3_ds.data.order.source_matching import FoundSource
from beit3_ds.data.order.stream import StreamOrder
from tests.data.conftest import BuildConfig, WriteTar


def found(sizes: list[int]) -> list[FoundSource]:
    return [FoundSource(path=str(i), size=size, digest=lambda count, i=i: f"{i}") for i, size in enumerate(sizes)]


def position(sizes: list[int], blocks: tuple[int, int] | None, weights: Any = None) -> StreamPosition:
    return new_position("images", 3, 4, weights, found(sizes), blocks=blocks)


def samples(start: StreamPosition, first: int, count: int) -> list[tuple[int, int]]:
    epochs, numbers = StreamOrder(start)(np.arange(first, first + count))
    return list(zip(epochs.tolist(), numbers.tolist(), strict=True))


@given(size=st.integers(1, 400), block=st.integers(1, 50), window=st.integers(1, 9), seed=st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_every_sample_once(size: int, block: int, window: int, seed: int) -> None:
    order = BlockPermutation(size, seed, ("images", 0), block, window)
    everything = order(np.arange(size))
    assert sorted(everything.tolist()) == list(range(size))  # catches a tail that is lost or comes twice
    some = np.random.default_rng(seed).permutation(size)[:20]
    assert np.array_equal(order(some), everything[some])  # catches an answer that depends on what else was asked


def test_a_stretch_comes_from_few_blocks_and_epochs_differ() -> None:
    size, block, window = 10_000, 100, 5
    orders = [BlockPermutation(size, 1, ("images", epoch), block, window)(np.arange(size)) for epoch in range(2)]
    assert not np.array_equal(*orders)
    for order in orders:
        for first in range(0, size, block * window):
            stretch = np.sort(order[first : first + block * window])
            # catches a window that is shuffled over the whole epoch
            assert (np.diff(stretch) > 1).sum() <= window
            assert not np.array_equal(stretch, order[first : first + block * window])  # catches no shuffle within it
        starts = order[:: block * window] // block
        assert abs(np.diff(starts)).mean() > 10  # catches blocks that are visited in their order


@given(st.lists(st.integers(3, 60), min_size=1, max_size=3), st.integers(0, 200), st.integers(1, 80), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_stored_position_goes_on(sizes: list[int], first: int, count: int, weighted: bool) -> None:
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


def test_a_grown_source_goes_on_without_repeats() -> None:
    start = position([50], (7, 2))
    continued, _ = continue_stream(start.advanced(20), 3, 4, None, found([64]), (7, 2))
    seen = [number for _, number in samples(start, 0, 20)]
    assert sorted([*seen, *(number for _, number in samples(continued, 0, 44))]) == list(range(64))


def test_the_config_chooses_the_order(build_config: BuildConfig) -> None:
    assert build_config().data.blocks() is None
    data = {"order": "shard_sequential", "block_samples": 9, "window_blocks": 2}
    assert build_config(data=data).data.blocks() == (9, 2)
    key = ("images", block_key(9, 2), 0)
    assert isinstance(order_permutation(1, key, 40), BlockPermutation)


def test_few_shards_are_open_at_a_time(tmp_path: Path, write_tar: WriteTar) -> None:
    """Ten shards of which two may stay open: the block order opens each about once, the other one at every record."""
    from beit3_ds.benchmarks.data.file_calls import count_file_calls

    for shard in range(10):
        write_tar(tmp_path / f"{shard}.tar", {f"{i}.txt": b"text" for i in range(50)})
    opens = {}
    for name, key in (("shuffled", ("x", 0)), ("blocks", ("x", block_key(50, 1), 0))):
        shards = TarShards([str(tmp_path / "*.tar")], files=OpenFiles(limit=2))
        order = order_permutation(1, key, len(shards))(np.arange(len(shards)))
        with count_file_calls() as calls:
            for index in order.tolist():
                shards.caption(index)
        opens[name] = calls.opens
    assert opens["shuffled"] > 300
    assert opens["blocks"] <= 22  # a block lies in two shards at most
