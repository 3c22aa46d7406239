"""Tests the CPU memory allocator: it reuses freed memory, and falls back to PyTorch's allocator."""

import resource
import sys
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from beit3_ds.kernels.cpu.allocator import ALLOCATOR, Allocator
from beit3_ds.kernels.cpu.host_memory import HostMemory
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from tests.kernels.cpu.test_host_memory import MIB, gaps_of
from tests.ranks import run_ranks


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    """Gives the allocator 16 MiB of host memory."""
    memory = HostMemory(16 * MIB)
    with mock.patch.object(ALLOCATOR, "host_memory", memory):
        yield memory


def test_memory_of_a_freed_tensor_is_reused(memory: HostMemory) -> None:
    like = torch.zeros(())
    first = ALLOCATOR.empty(like, 1000, 3)
    address, part = first.data_ptr(), first[10:20]
    del first
    assert ALLOCATOR.empty(like, 1000, 3).data_ptr() != address, "a view still holds the storage"
    del part
    assert ALLOCATOR.empty(like, 1000, 3).data_ptr() == address
    assert gaps_of(memory) == [(0, 16 * MIB)]


def test_lasting_tensors_are_above_short_lived_ones(memory: HostMemory) -> None:
    like = torch.zeros(())
    memory.expect(lasting=MIB)
    rows = ALLOCATOR.empty(like, MIB // 8)  # half a MiB
    gradients = [ALLOCATOR.empty(like, MIB // 16, lasting=True) for _ in range(2)]
    addresses = [tensor.data_ptr() - rows.data_ptr() for tensor in gradients]
    assert addresses == [MIB + MIB // 64 - MIB // 4, MIB + MIB // 64 - MIB // 2]
    del rows
    last = ALLOCATOR.empty(like, MIB // 8, lasting=True)
    assert last.data_ptr() < gradients[1].data_ptr(), "the memory of the rows must be reused"
    assert gaps_of(memory)[-1][0] == MIB + MIB // 64


def test_tensors_without_room_are_pytorchs(memory: HostMemory) -> None:
    tensor = ALLOCATOR.empty(torch.zeros(()), 5 * MIB)
    tensor.fill_(1.0)
    assert gaps_of(memory) == [(0, 16 * MIB)] and tensor.shape == (5 * MIB,)


def test_shapes_dtypes_and_fake_tensors(memory: HostMemory) -> None:
    like = nn.Parameter(torch.zeros(4, 3, dtype=torch.bfloat16))
    assert ALLOCATOR.empty_like(like).dtype is torch.bfloat16 and ALLOCATOR.empty_like(like).shape == (4, 3)
    assert ALLOCATOR.empty(like, 2, dtype=torch.float64).dtype is torch.float64
    assert ALLOCATOR.empty(like, 0, 5).shape == (0, 5)
    assert not ALLOCATOR.empty_like(like).requires_grad
    assert gaps_of(memory) == [(0, 16 * MIB)]
    with FakeTensorMode() as mode:
        assert type(ALLOCATOR.empty_like(mode.from_tensor(torch.zeros(3)))) is not torch.Tensor
    moved = ALLOCATOR.settle(like.detach())
    assert torch.equal(moved, like) and moved.data_ptr() != like.data_ptr()


def test_autograd_adds_to_it_in_place(memory: HostMemory) -> None:
    # Otherwise the sum of the gradients of queries, keys and values takes one more tensor per layer.
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
            tensor = ALLOCATOR.empty(like, 64, lasting=number % 2 == 0).fill_(number)
            wrong.extend([number] * int((tensor != number).any()))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # switches threads wherever possible
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and gaps_of(memory) == [(0, 16 * MIB)]


def test_a_kernel_that_refuses_leaves_torchs_allocator() -> None:
    allocator = Allocator()
    with mock.patch("mmap.mmap", side_effect=OSError(12, "no memory")):
        allocator.keep_freed_memory(torch.device("cpu"), lasting=100)
    assert allocator.host_memory is None
    assert allocator.empty(torch.zeros(()), 3).shape == (3,)


def test_on_a_gpu_nothing_is_kept() -> None:
    allocator = Allocator()
    allocator.keep_freed_memory(torch.device("cuda"), lasting=100)
    assert allocator.host_memory is None


def count_faults(makes: str) -> list[int]:
    """Allocates and frees 64 MiB repeatedly; returns the page faults of each allocation (16384 are all pages)."""
    ALLOCATOR.keep_freed_memory(torch.device("cpu"))
    like, faults = torch.zeros(()), []
    for _ in range(16):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        _ = torch.ones(1 << 24) if makes == "torch" else ALLOCATOR.empty(like, 1 << 24).fill_(1.0)
        del _
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return faults


def test_freed_memory_is_used_again() -> None:
    (faults,) = run_ranks(count_faults, 1, "host_memory")
    assert max(faults[1:]) < 100
    # The minimum: small objects allocated behind a tensor's memory may keep the heap from reusing it. Without malloc's
    # settings every allocation faults on all pages.
    (faults,) = run_ranks(count_faults, 1, "torch")
    assert min(faults[1:]) < 1000
