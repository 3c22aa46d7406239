"""Reuses memory for the tensors that every training step on a CPU allocates and frees.

Every step needs the same gigabytes of activations and gradients. glibc's memory fragments: the space of a freed tensor
is slightly too small for another aligned tensor of the same size. Small tensors that live long also split the free
space between large tensors.

So activations and gradients get their own address range. Activations are allocated from the lower end of this range,
and are freed in the order of allocation or in reverse order. Weight gradients live until the optimizer's update. They
are placed as high as possible within the part of the range that has been used or reserved so far. At the end of the
backward pass, weight gradients reuse memory that activations have freed (BENCHMARKS.md). On a GPU, PyTorch's caching
allocator does this work.
"""

import math
import mmap
import threading
import weakref
from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Alignment of a tensor's first byte, in bytes; PyTorch's allocator uses the same value."""
_MAP_NORESERVE = 0x4000
"""Value of MAP_NORESERVE in Linux's mman.h; Python 3.11 does not define this flag."""


class Gaps:
    """Tracks the free byte ranges, called gaps, of an address range. No gap is empty, and no two gaps are adjacent."""

    def __init__(self, size: int) -> None:
        """Starts with one gap, which covers all bytes [0, size)."""
        self._starts, self._stops = [0], [size]

    def take_low(self, size: int) -> int | None:
        """Allocates `size` bytes at the start of the lowest gap that is large enough.

        Returns:
            Offset at which the allocated bytes start; None if no gap is large enough.
        """
        for index, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            if stop - start >= size:
                self._cut(index, start, start + size)
                return start
        return None

    def take_high(self, size: int, ceiling: int) -> int | None:
        """Allocates `size` adjacent bytes at the highest possible offset below `ceiling`.

        Args:
            size: number of bytes.
            ceiling: offset below which the allocated bytes must lie.

        Returns:
            Offset at which the allocated bytes start; None if no gap below `ceiling` is large enough.
        """
        for index in range(bisect_left(self._starts, ceiling) - 1, -1, -1):
            stop = min(self._stops[index], ceiling)
            if stop - self._starts[index] >= size:
                self._cut(index, stop - size, stop)
                return stop - size
        return None

    def give(self, start: int, size: int) -> None:
        """Frees the bytes [start, start + size), and merges the new gap with adjacent gaps."""
        index, stop = bisect_left(self._starts, start), start + size
        touches_next = index < len(self._starts) and self._starts[index] == stop
        touches_last = index > 0 and self._stops[index - 1] == start
        joined = slice(index - touches_last, index + touches_next)
        self._starts[joined] = [min(start, *self._starts[joined], start)]
        self._stops[joined] = [max(stop, *self._stops[joined], stop)]

    def ranges(self) -> list[tuple[int, int]]:
        """Returns the byte range (start, stop) of each gap in ascending order."""
        return list(zip(self._starts, self._stops, strict=True))

    def _cut(self, index: int, start: int, stop: int) -> None:
        kept = [(self._starts[index], start), (stop, self._stops[index])]
        kept = [(low, high) for low, high in kept if low < high]
        self._starts[index : index + 1] = [low for low, _ in kept]
        self._stops[index : index + 1] = [high for _, high in kept]


class HostMemory:
    """Allocates tensors in a memory mapping, in which new tensors reuse the bytes of released tensors.

    A tensor's bytes can be reused when PyTorch releases the tensor's storage. The operating system provides a page of
    memory when the process first writes to that page. The process then keeps the page, even while no tensor uses it.
    """

    def __init__(self, size: int) -> None:
        """Maps an address range for tensors.

        Args:
            size: size of the range in bytes. All tensors together cannot be larger.

        Raises:
            OSError: if the operating system refuses the mapping.
        """
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._bytes = memoryview(mmap.mmap(-1, size, flags=flags))
        self._gaps, self._ceiling = Gaps(size), 0
        self._lock = threading.Lock()
        self._taken: dict[int, weakref.ref[memoryview]] = {}
        self._freed: deque[tuple[int, int]] = deque()

    def expect(self, lasting: int) -> None:
        """Reserves space for tensors that live until the end of a step.

        Args:
            lasting: total bytes of these tensors. A margin of 1/64 is added.
        """
        self._ceiling = max(self._ceiling, lasting + lasting // 64)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, lasting: bool) -> Tensor | None:
        """Returns an uninitialised tensor, or None if no free range of bytes is large enough.

        Args:
            shape: shape of the tensor; all sizes must be positive.
            dtype: dtype of the tensor.
            lasting: whether the tensor lives until the end of a step. If False, the tensor gets the lowest free bytes
                of the mapping. If True, the tensor gets the highest free bytes below the highest offset that was used
                or reserved so far. If it does not fit there, it gets the lowest free bytes, as with False.
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
            # A storage may be freed at any time, even between these lines, so its callback only records the range.
            self._taken[start] = weakref.ref(part, lambda _: self._freed.append(note))
        # Not a view: its base would refer to the storage too, and autograd then would not add gradients in place.
        return torch.frombuffer(part, dtype=dtype, count=count).resize_(shape)

    def _collect(self) -> None:
        while self._freed:
            start, size = self._freed.popleft()
            del self._taken[start]
            self._gaps.give(start, size)
