"""Host memory for what comes and goes with a training step, where the model trains on the CPU.

Every step allocates the same gigabytes of rows and gradients. glibc serves them badly: it asks for more than an aligned
block has, so a freed block does not serve the next request of its own size, and small tensors that stay split the gaps
between large ones. So they get a range of addresses of their own. Rows, which are freed in the order in which they were
made or against it, lie at its lower end; gradients of weights, which stay until the update, at its upper end: at the
end of the backward pass they lie where rows have been (BENCHMARKS.md). On a GPU, torch's caching allocator serves.
"""

import ctypes
import math
import mmap
import os
import sys
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ALIGNMENT = 64
"""Bytes, as torch aligns tensors itself."""
_MAP_NORESERVE = 0x4000
"""Of Linux's mman.h; Python 3.11 has no name for it."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


class Gaps:
    """The free parts of a range of addresses, none empty, no two of which touch."""

    def __init__(self, size: int) -> None:
        """Begins with [0, size) free."""
        self._starts, self._stops = [0], [size]

    def take_low(self, size: int) -> int | None:
        """Takes `size` bytes from the lower end of the lowest gap that has them.

        Returns:
            Where they begin; None if no gap has them.
        """
        for index, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            if stop - start >= size:
                self._cut(index, start, start + size)
                return start
        return None

    def take_high(self, size: int, ceiling: int) -> int | None:
        """Takes `size` bytes from the upper end of the highest gap that has them below `ceiling`; returns likewise."""
        for index in range(bisect_left(self._starts, ceiling) - 1, -1, -1):
            stop = min(self._stops[index], ceiling)
            if stop - self._starts[index] >= size:
                self._cut(index, stop - size, stop)
                return stop - size
        return None

    def give(self, start: int, size: int) -> None:
        """Gives back what was taken, to be one with the gaps that it touches."""
        index, stop = bisect_left(self._starts, start), start + size
        touches_next = index < len(self._starts) and self._starts[index] == stop
        touches_last = index > 0 and self._stops[index - 1] == start
        joined = slice(index - touches_last, index + touches_next)
        self._starts[joined] = [min(start, *self._starts[joined], start)]
        self._stops[joined] = [max(stop, *self._stops[joined], stop)]

    def ranges(self) -> list[tuple[int, int]]:
        """Start and stop of all, in ascending order."""
        return list(zip(self._starts, self._stops, strict=True))

    def _cut(self, index: int, start: int, stop: int) -> None:
        kept = [(self._starts[index], start), (stop, self._stops[index])]
        kept = [(low, high) for low, high in kept if low < high]
        self._starts[index : index + 1] = [low for low, _ in kept]
        self._stops[index : index + 1] = [high for _, high in kept]


class HostMemory:
    """A mapping for tensors. What a tensor took is free again when nothing holds its storage any more.

    Pages are the kernel's until they are written, and from then on the process's.
    """

    def __init__(self, size: int) -> None:
        """Maps addresses.

        Args:
            size: in bytes; the most that tensors can take together.

        Raises:
            OSError: if the kernel refuses.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._bytes = memoryview(mmap.mmap(-1, size, flags=flags))
        self._gaps, self._ceiling = Gaps(size), 0
        self._lock = threading.Lock()
        self._taken: dict[int, weakref.ref[memoryview]] = {}
        self._freed: deque[tuple[int, int]] = deque()

    def expect(self, lasting: int) -> None:
        """Makes room for tensors that last: these stay below that many bytes, and a little more for what is beside."""
        self._ceiling = max(self._ceiling, lasting + lasting // 64)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, lasting: bool) -> Tensor | None:
        """An uninitialised tensor with at least one element, or None if there is no room for it.

        Args:
            shape: of the tensor.
            dtype: likewise.
            lasting: whether it is to lie at the upper end of what was ever taken, not at the lower.
        """
        count = math.prod(shape)
        size = -(-count * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._collect()
            start = self._gaps.take_high(size, self._ceiling) if lasting else None
            if start is None:
                start = self._gaps.take_low(size)
            if start is None:
                return None
            self._ceiling = max(self._ceiling, start + size)
            part, note = self._bytes[start : start + size], (start, size)
            # A storage may end at any time, amid these lines, too: its end only leaves a note.
            self._taken[start] = weakref.ref(part, lambda _: self._freed.append(note))
        # Not a view, whose base would hold the storage as well: autograd adds in place only where it alone holds it.
        return torch.frombuffer(part, dtype=dtype, count=count).resize_(shape)

    def _collect(self) -> None:
        while self._freed:
            start, size = self._freed.popleft()
            del self._taken[start]
            self._gaps.give(start, size)


_memory: HostMemory | None = None


def keep_freed_memory(device: torch.device, lasting: int = 0) -> None:
    """Lets a process that trains on the CPU keep the memory that it frees, for its next tensors, from here on.

    What `empty` makes has a range of its own, if the kernel grants one. Of what torch makes itself, glibc would give
    much back to the kernel, which then zeroes the same pages again in every step.

    Args:
        device: that it trains on; for any but the CPU nothing is done.
        lasting: bytes of all tensors together that stay to the end of a step, or 0 if there are few.
    """
    global _memory
    if device.type != "cpu" or sys.platform != "linux":
        return
    if _memory is None:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
                libc.mallopt(option, _LARGEST_INT)
        try:
            _memory = HostMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        except OSError:  # a limit of addresses, or `vm.overcommit_memory=2`: torch's own allocator serves
            return
    _memory.expect(lasting)


def empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None, lasting: bool = False) -> Tensor:
    """An uninitialised, contiguous tensor on the device of `like`.

    Args:
        like: also gives the dtype if none is given.
        shape: of the tensor.
        dtype: of the tensor.
        lasting: whether it stays to the end of a step, as a gradient of a weight does.
    """
    dtype = like.dtype if dtype is None else dtype
    # Subclasses may stand for tensors that have no memory.
    if _memory is not None and like.device.type == "cpu" and type(like) in (Tensor, nn.Parameter) and 0 not in shape:
        tensor = _memory.empty(shape, dtype, lasting)
        if tensor is not None:
            return tensor
    return like.new_empty(shape, dtype=dtype)


def empty_like(x: Tensor, lasting: bool = False) -> Tensor:
    """The same, of the shape and dtype of `x`."""
    return empty(x, *x.shape, lasting=lasting)


def settle(x: Tensor, lasting: bool = False) -> Tensor:
    """`x`, or a copy where host memory is kept: for small tensors of torch's own making that a step holds on to."""
    return x if _memory is None or x.device.type != "cpu" else empty_like(x, lasting).copy_(x)
