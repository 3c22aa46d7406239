"""Allocates the output tensors of the ops on a CPU."""

import ctypes
import os
import sys

import torch
from torch import Tensor, nn

from beit3_ds.kernels.cpu.host_memory import HostMemory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


class Allocator:
    """Allocates uninitialised tensors from PyTorch or, after `keep_freed_memory`, from its own memory mapping."""

    def __init__(self) -> None:
        """Starts without a memory mapping: PyTorch allocates all tensors until `keep_freed_memory` is called."""
        self.host_memory: HostMemory | None = None

    def keep_freed_memory(self, device: torch.device, lasting: int = 0) -> None:
        """Lets this process keep freed memory and reuse it for all later allocations, if it trains on the CPU.

        This allocator's tensors get their own address range, if the operating system grants one. PyTorch's own tensors
        come from glibc, which then no longer returns freed memory to the system. The system would have to zero the
        returned pages again in every step.

        Args:
            device: device of the training. If it is not the CPU, the call does nothing.
            lasting: total bytes of the tensors that stay until the end of a step, such as the weights' gradients; 0 if
                there are few.
        """
        if device.type != "cpu" or sys.platform != "linux":
            return
        if self.host_memory is None:
            libc = ctypes.CDLL(None)
            if hasattr(libc, "mallopt"):
                for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
                    libc.mallopt(option, _LARGEST_INT)
            try:
                self.host_memory = HostMemory(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
            except OSError:  # an address space limit, or `vm.overcommit_memory=2`: PyTorch's allocator stays
                return
        self.host_memory.expect(lasting)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None, lasting: bool = False) -> Tensor:
        """Returns an uninitialised, contiguous tensor on the device of `like`.

        Args:
            like: gives the device, and the dtype if none is given.
            shape: shape of the tensor.
            dtype: dtype of the tensor.
            lasting: whether the tensor stays until the end of a step, as a weight's gradient does.
        """
        dtype = like.dtype if dtype is None else dtype
        has_memory = type(like) in (Tensor, nn.Parameter)  # other subclasses may have none, as fake tensors
        if self.host_memory is not None and like.device.type == "cpu" and has_memory and 0 not in shape:
            tensor = self.host_memory.empty(shape, dtype, lasting)
            if tensor is not None:
                return tensor
        return like.new_empty(shape, dtype=dtype)

    def empty_like(self, x: Tensor, lasting: bool = False) -> Tensor:
        """Returns an uninitialised, contiguous tensor with the shape, dtype and device of `x`."""
        return self.empty(x, *x.shape, lasting=lasting)

    def settle(self, x: Tensor, lasting: bool = False) -> Tensor:
        """Returns a copy of `x` in the memory mapping, or `x` itself if the allocator has no mapping or x is on a GPU.

        Use it for small tensors that stay during a step: in glibc's memory they would split the free space.
        """
        return x if self.host_memory is None or x.device.type != "cpu" else self.empty_like(x, lasting).copy_(x)


ALLOCATOR = Allocator()
"""Allocator of all ops; one per process, because glibc's settings apply to the whole process."""
