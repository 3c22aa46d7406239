"""Tests host memory: its free ranges, and the tensors in it."""

# T rows, D width.

import gc

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.cpu.host_memory import Gaps, HostMemory

MIB = 1 << 20


def gaps_of(memory: HostMemory) -> list[tuple[int, int]]:
    """Returns the free ranges after all freed storages are collected."""
    gc.collect()
    memory._collect()
    return memory._gaps.ranges()


requests = st.lists(st.tuples(st.integers(1, 300), st.booleans(), st.integers(0, 99)), max_size=60)


@given(requests, st.integers(0, 1200))
@settings(deadline=None)
def test_gaps_and_taken_bytes_tile_the_range(requests: list[tuple[int, bool, int]], ceiling: int) -> None:
    size, gaps = 1000, Gaps(1000)
    taken: list[tuple[int, int]] = []
    for length, high, choice in requests:
        largest = max((stop - start for start, stop in gaps.ranges()), default=0)
        start = gaps.take_high(length, ceiling) if high else gaps.take_low(length)
        if start is None:
            assert high or length > largest
        else:
            assert not high or start + length <= ceiling
            taken.append((start, start + length))
        if taken and choice % 3 == 0:
            begin, stop = taken.pop(choice % len(taken))
            gaps.give(begin, stop - begin)
        parts = sorted(taken + gaps.ranges())
        assert [begin for begin, _ in parts] == [0, *(stop for _, stop in parts[:-1])] and parts[-1][1] == size
        assert all(before[1] < after[0] for before, after in zip(gaps.ranges(), gaps.ranges()[1:], strict=False))
    for begin, stop in taken:
        gaps.give(begin, stop - begin)
    assert gaps.ranges() == [(0, size)]


def test_low_is_the_lowest_and_high_the_highest_below_the_ceiling() -> None:
    gaps = Gaps(100)
    assert [gaps.take_low(10), gaps.take_high(10, 50), gaps.take_high(10, 50), gaps.take_low(25)] == [0, 40, 30, 50]
    gaps.give(40, 10)
    assert [gaps.take_low(10), gaps.take_high(10, 50), gaps.take_high(10, 50)] == [10, 40, 20]


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20))
@settings(deadline=None)
def test_live_tensors_share_no_byte(widths: list[int]) -> None:
    memory = HostMemory(MIB)
    tensors = [memory.empty((3, width), torch.float32, width % 2 == 0) for width in widths]
    for number, tensor in enumerate(tensors):
        assert tensor is not None and tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors) if tensor is not None)
