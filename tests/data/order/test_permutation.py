"""Tests permutations: every sample once, either without a visible order or in blocks of neighbours."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.order.permutation import BlockPermutation, KeyedPermutation, block_key, order_permutation
from tests.data.conftest import BuildConfig, WriteTar


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


def test_the_config_chooses_the_order(build_config: BuildConfig) -> None:
    assert build_config().data.blocks() is None
    data = {"order": "shard_sequential", "block_samples": 9, "window_blocks": 2}
    assert build_config(data=data).data.blocks() == (9, 2)
    key = ("images", block_key(9, 2), 0)
    assert isinstance(order_permutation(1, key, 40), BlockPermutation)


def test_few_shards_are_open_at_a_time(tmp_path: Path, write_tar: WriteTar) -> None:
    """Counts how often shards are opened if only two of ten can be open.

    The block order opens each shard about once; the other order opens a shard per record.
    """
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
    assert opens["blocks"] <= 22  # a block is in two shards at most


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_permutation_is_a_bijection(size: int, seed: int) -> None:
    samples = KeyedPermutation(size, np.random.default_rng(seed))(np.arange(size))
    # catches walking that stops outside, and halves of different width mixed up
    assert np.array_equal(np.sort(samples), np.arange(size))


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 36_000_000])
def test_large_permutation_stays_inside_and_never_repeats(size: int) -> None:
    positions = np.concatenate([np.arange(50_000), np.arange(size - 50_000, size)])
    samples = KeyedPermutation(size, np.random.default_rng(0))(positions)
    assert samples.min() >= 0
    assert samples.max() < size
    assert len(np.unique(samples)) == len(positions)
    assert abs(np.corrcoef(positions, samples)[0, 1]) < 0.02  # catches a network that leaves the order almost as it is


def test_every_sample_comes_first_equally_often() -> None:
    size, rng = 5, np.random.default_rng(0)
    first = [int(KeyedPermutation(size, rng)(np.array([0]))[0]) for _ in range(2000)]
    # catches too few rounds on a tiny domain; 400 expected, deviation 18
    assert min(np.bincount(first, minlength=size)) > 310


@pytest.mark.slow
def test_permutation_is_a_bijection_of_the_paper_s_36_million_images() -> None:
    size, chunk = 36_000_000, 1_000_000
    permutation, seen = KeyedPermutation(size, np.random.default_rng(0)), np.zeros(size, dtype=bool)
    for start in range(0, size, chunk):
        samples = permutation(np.arange(start, start + chunk))
        assert not seen[samples].any()
        seen[samples] = True
    assert seen.all()
