"""Manages host memory for the tensors that each training step on a CPU allocates and frees.

Every step allocates the same gigabytes of rows and gradients. glibc fragments this memory: it pads each request for
alignment, so a freed block does not fit the next request of the same size. Small lasting tensors also split the gaps
between large ones. So rows and gradients get an address range of their own. Rows are allocated from its lower end and
freed in the order of their allocation, or in reverse. Gradients of weights stay until the optimizer's update. They are
allocated from the upper end, so at the end of the backward pass they reuse the memory of rows (BENCHMARKS.md). On a
GPU, PyTorch's caching allocator does all this.
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
"""Alignment of tensors in bytes, the same as PyTorch's own."""
_MAP_NORESERVE = 0x4000
"""Flag of Linux's mman.h; Python 3.11 has no name for it."""


class Gaps:
    """Tracks the gaps (free byte ranges) of an address range; no gap is empty, and no two gaps are adjacent."""

    def __init__(self, size: int) -> None:
        """Starts with one gap, the whole range [0, size)."""
        self._starts, self._stops = [0], [size]

    def take_low(self, size: int) -> int | None:
        """Takes `size` bytes from the lower end of the lowest gap that is large enough.

        Returns:
            Address of the first byte; None if no gap is large enough.
        """
        for index, (start, stop) in enumerate(zip(self._starts, self._stops, strict=True)):
            if stop - start >= size:
                self._cut(index, start, start + size)
                return start
        return None

    def take_high(self, size: int, ceiling: int) -> int | None:
        """Takes the highest `size` adjacent free bytes whose addresses are all below `ceiling`.

        Returns:
            Address of the first byte; None if no gap is large enough.
        """
        for index in range(bisect_left(self._starts, ceiling) - 1, -1, -1):
            stop = min(self._stops[index], ceiling)
            if stop - self._starts[index] >= size:
                self._cut(index, stop - size, stop)
                return stop - size
        return None

    def give(self, start: int, size: int) -> None:
        """Frees the bytes [start, start + size) and merges them with adjacent gaps."""
        index, stop = bisect_left(self._starts, start), start + size
        touches_next = index < len(self._starts) and self._starts[index] == stop
        touches_last = index > 0 and self._stops[index - 1] == start
        joined = slice(index - touches_last, index + touches_next)
        self._starts[joined] = [min(start, *self._starts[joined], start)]
        self._stops[joined] = [max(stop, *self._stops[joined], stop)]

    def ranges(self) -> list[tuple[int, int]]:
        """Returns (start, stop) of every gap, in ascending order."""
        return list(zip(self._starts, self._stops, strict=True))

    def _cut(self, index: int, start: int, stop: int) -> None:
        kept = [(self._starts[index], start), (stop, self._stops[index])]
        kept = [(low, high) for low, high in kept if low < high]
        self._starts[index : index + 1] = [low for low, _ in kept]
        self._stops[index : index + 1] = [high for _, high in kept]


class HostMemory:
    """Allocates tensors in a memory mapping, and frees their bytes when nothing refers to their storage.

    The operating system provides each page at the first write, and the process keeps the page from then on.
    """

    def __init__(self, size: int) -> None:
        """Maps an address range for the tensors.

        Args:
            size: size of the range in bytes, the maximum of all tensors together.

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
        """Reserves room for `lasting` bytes of tensors that stay until the end of a step.

        Reserves 1/64 more, for the other tensors that end up between them.
        """
        self._ceiling = max(self._ceiling, lasting + lasting // 64)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, lasting: bool) -> Tensor | None:
        """Returns an uninitialised tensor with at least one element, or None if there is no room for it.

        Args:
            shape: shape of the tensor.
            dtype: dtype of the tensor.
            lasting: whether the tensor stays until the end of a step. If so, it gets the highest free bytes below the
                highest address used or reserved so far. Any other tensor gets the lowest free bytes.
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
