"""Host memory of which every byte serves again."""

# T rows, D width.

import gc
import resource
import sys
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from beit3_ds.kernels.cpu import host_memory
from beit3_ds.kernels.cpu.host_memory import Gaps, HostMemory, empty, empty_like, keep_freed_memory, settle
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from tests.ranks import run_ranks

MIB = 1 << 20


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    """Host memory that `empty` takes from, of 16 MiB."""
    with mock.patch.object(host_memory, "_memory", HostMemory(16 * MIB)):
        yield host_memory._memory


def gaps_of(memory: HostMemory) -> list[tuple[int, int]]:
    """The free ranges once everything that died is free."""
    gc.collect()
    memory._collect()
    return memory._gaps.ranges()


requests = st.lists(st.tuples(st.integers(1, 300), st.booleans(), st.integers(0, 99)), max_size=60)


@given(requests, st.integers(0, 1200))
@settings(deadline=None)
def test_gaps_and_what_was_taken_tile_the_range(requests: list[tuple[int, bool, int]], ceiling: int) -> None:
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
        pieces = sorted(taken + gaps.ranges())
        assert [begin for begin, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])] and pieces[-1][1] == size
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
def test_tensors_that_live_share_no_byte(widths: list[int]) -> None:
    memory = HostMemory(MIB)
    tensors = [memory.empty((3, width), torch.float32, width % 2 == 0) for width in widths]
    for number, tensor in enumerate(tensors):
        assert tensor is not None and tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors) if tensor is not None)


def test_the_memory_of_a_dead_tensor_serves_the_next(memory: HostMemory) -> None:
    like = torch.zeros(())
    first = empty(like, 1000, 3)
    address, part = first.data_ptr(), first[10:20]
    del first
    assert empty(like, 1000, 3).data_ptr() != address, "a view still holds the storage"
    del part
    assert empty(like, 1000, 3).data_ptr() == address
    assert gaps_of(memory) == [(0, 16 * MIB)]


def test_lasting_tensors_lie_above_what_comes_and_goes(memory: HostMemory) -> None:
    like = torch.zeros(())
    memory.expect(lasting=MIB)
    rows = empty(like, MIB // 8)  # half a MiB
    gradients = [empty(like, MIB // 16, lasting=True) for _ in range(2)]
    addresses = [tensor.data_ptr() - rows.data_ptr() for tensor in gradients]
    assert addresses == [MIB + MIB // 64 - MIB // 4, MIB + MIB // 64 - MIB // 2]
    del rows
    last = empty(like, MIB // 8, lasting=True)
    assert last.data_ptr() < gradients[1].data_ptr(), "where the rows were"
    assert gaps_of(memory)[-1][0] == MIB + MIB // 64


def test_what_has_no_room_is_torchs(memory: HostMemory) -> None:
    tensor = empty(torch.zeros(()), 5 * MIB)
    tensor.fill_(1.0)
    assert gaps_of(memory) == [(0, 16 * MIB)] and tensor.shape == (5 * MIB,)


def test_shapes_dtypes_and_stand_ins(memory: HostMemory) -> None:
    like = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert empty_like(like).dtype is torch.bfloat16 and empty_like(like).shape == (4, 3)
    assert empty(like, 2, dtype=torch.float64).dtype is torch.float64
    assert empty(like, 0, 5).shape == (0, 5)
    assert not empty_like(like).requires_grad
    assert gaps_of(memory) == [(0, 16 * MIB)]
    with FakeTensorMode() as mode:
        assert type(empty_like(mode.from_tensor(torch.zeros(3)))) is not torch.Tensor
    moved = settle(like.detach())
    assert torch.equal(moved, like) and moved.data_ptr() != like.data_ptr()


def test_autograd_adds_to_it_in_place(memory: HostMemory) -> None:
    # Otherwise the sum of the gradients of queries, keys and values is one more tensor a layer.
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, dy: torch.Tensor) -> torch.Tensor:
            return multiway_linear(dy, [(0, len(dy))], [torch.eye(3)], [])

    x = torch.ones(5, 3, requires_grad=True)
    h = x * 1
    loss = Double.apply(h).sum() + Double.apply(h).sum()
    with torch.profiler.profile() as profile:
        loss.backward()
    assert "aten::add" not in {event.key for event in profile.key_averages()}
    assert torch.equal(x.grad, torch.full((5, 3), 2.0))  # type: ignore[arg-type]


def test_threads_do_not_get_the_same_memory(memory: HostMemory) -> None:
    like, wrong = torch.zeros(()), []

    def work(number: int) -> None:
        for _ in range(300):
            tensor = empty(like, 64, lasting=number % 2 == 0).fill_(number)
            wrong.extend([number] * int((tensor != number).any()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread is interrupted wherever it can be
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and gaps_of(memory) == [(0, 16 * MIB)]


def test_a_kernel_that_refuses_leaves_torchs_allocator() -> None:
    with mock.patch.object(host_memory, "_memory", None), mock.patch("mmap.mmap", side_effect=OSError(12, "no memory")):
        keep_freed_memory(torch.device("cpu"), lasting=100)
        assert host_memory._memory is None
        assert empty(torch.zeros(()), 3).shape == (3,)


def test_on_a_gpu_nothing_is_kept() -> None:
    with mock.patch.object(host_memory, "_memory", None):
        keep_freed_memory(torch.device("cuda"), lasting=100)
        assert host_memory._memory is None


def count_faults(makes: str) -> list[int]:
    """Pages that a process asks the kernel for whenever it makes 64 MiB after it freed as much; 16384 if all."""
    keep_freed_memory(torch.device("cpu"))
    like, faults = torch.zeros(()), []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = torch.ones(1 << 24) if makes == "torch" else empty(like, 1 << 24).fill_(1.0)
        del _
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


def test_freed_memory_is_used_again() -> None:
    (faults,) = run_ranks(count_faults, 1, "host_memory")
    assert max(faults[1:]) < 100
    # Not every time: a tensor's own small objects may come to lie behind its memory, which then stands between two
    # pieces of heap until both are freed. Without the setting every one of them asks for all of its pages.
    (faults,) = run_ranks(count_faults, 1, "torch")
    assert min(faults[1:]) < 1000
