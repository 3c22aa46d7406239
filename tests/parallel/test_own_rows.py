"""Tests the rows of each tensor-parallel rank under sequence parallelism."""

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.parallel import TensorParallel

SIZES = st.integers(1, 9)
SLICES = st.lists(st.integers(0, 7), min_size=1, max_size=5)  # rows per expert; some may have none


def ranks(size: int) -> list[TensorParallel]:
    return [TensorParallel(rank=rank, size=size, sequence_parallel=True) for rank in range(size)]


@given(SIZES, st.integers(0, 40))
def test_ranges_tile_the_rows_and_the_filler(size: int, num_rows: int) -> None:
    """Checks that ranges have the equal lengths that reduce-scatter needs, with less than one padding row per rank."""
    ranges = [rank.own_row_range(num_rows) for rank in ranks(size)]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert len({stop - start for start, stop in ranges}) == 1
    assert num_rows <= ranges[-1][1] < num_rows + size


@given(SIZES, SLICES)
def test_own_slices_tile_each_slice_once(size: int, lengths: list[int]) -> None:
    """Catches a row that no expert or two experts normalise, and padding rows outside the last expert's rows."""
    borders = [0, *itertools.accumulate(lengths)]
    slices, num_rows = list(itertools.pairwise(borders)), borders[-1]
    experts: list[int] = []
    for rank in ranks(size):
        start, stop = rank.own_row_range(num_rows)
        own = rank.own_slices(slices, num_rows)
        assert len(own) == len(slices)
        assert [first for first, _ in own] == [0, *(last for _, last in own[:-1])] and own[-1][1] == stop - start
        experts += [expert for expert, (first, last) in enumerate(own) for _ in range(first, last)]
    filler = size * -(-num_rows // size) - num_rows
    whole = [expert for expert, length in enumerate(lengths) for _ in range(length)]
    assert experts == whole + [len(slices) - 1] * filler


@given(SIZES, st.integers(0, 40))
def test_own_rows_are_the_rows_and_zeros(size: int, num_rows: int) -> None:
    x = torch.arange(1, 2 * num_rows + 1).view(num_rows, 2)
    whole = torch.cat([rank.own_rows(x) for rank in ranks(size)])
    assert torch.equal(whole[:num_rows], x) and not whole[num_rows:].any()


@given(SIZES, SLICES)
def test_without_sequence_parallelism_every_rank_has_all(size: int, lengths: list[int]) -> None:
    borders = [0, *itertools.accumulate(lengths)]
    slices, num_rows = list(itertools.pairwise(borders)), borders[-1]
    for rank in range(size):
        tensor = TensorParallel(rank=rank, size=size)
        assert tensor.own_row_range(num_rows) == (0, num_rows)
        assert tensor.own_slices(slices, num_rows) == slices
