"""Allocates the tensors that ops create on a CPU."""

import ctypes
import os
import sys

import torch
from torch import Tensor, nn

from beit3_ds.kernels.cpu.host_memory import HostMemory

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


class Allocator:
    """Allocates uninitialised tensors.

    PyTorch allocates the memory. After `keep_freed_memory`, a memory mapping of this process is used instead.
    """

    def __init__(self) -> None:
        """Starts without a memory mapping, so PyTorch allocates the memory."""
        self.host_memory: HostMemory | None = None

    def keep_freed_memory(self, device: torch.device, lasting: int = 0) -> None:
        """Makes this process keep freed memory for later allocations, if the training runs on a CPU under Linux.

        Without this call, freed pages return to the operating system, and in the next step, it must provide zeroed
        pages again. After the call, this allocator creates tensors in its own memory mapping, if the operating system
        grants one. Tensors that PyTorch itself creates still come from glibc, which no longer returns freed memory to
        the operating system.

        Args:
            device: device of the training. If the device is not a CPU, the function does nothing.
            lasting: total bytes of all tensors that live until the end of a step, such as weight gradients; 0 if there
                are few such tensors.
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
            except OSError:  # an address space limit, or `vm.overcommit_memory=2`: use PyTorch's allocator
                return
        self.host_memory.expect(lasting)

    def empty(self, like: Tensor, *shape: int, dtype: torch.dtype | None = None, lasting: bool = False) -> Tensor:
        """Returns an uninitialised, contiguous tensor on the device of `like`.

        Args:
            like: tensor whose device is used, and whose dtype is the default.
            shape: shape of the new tensor.
            dtype: dtype of the new tensor; None means the dtype of `like`.
            lasting: whether the new tensor lives until the end of a step, like a weight gradient.
        """
        dtype = like.dtype if dtype is None else dtype
        has_memory = type(like) in (Tensor, nn.Parameter)  # other subclasses may have none, as fake tensors
        if self.host_memory is not None and like.device.type == "cpu" and has_memory and 0 not in shape:
            tensor = self.host_memory.empty(shape, dtype, lasting)
            if tensor is not None:
                return tensor
        return like.new_empty(shape, dtype=dtype)

    def empty_like(self, x: Tensor, lasting: bool = False) -> Tensor:
        """Returns an uninitialised, contiguous tensor with the shape, dtype and device of `x` (see `empty`)."""
        return self.empty(x, *x.shape, lasting=lasting)

    def settle(self, x: Tensor, lasting: bool = False) -> Tensor:
        """Copies `x` into the memory mapping and returns the copy.

        If there is no mapping, or `x` is on a GPU, returns `x` itself.

        Use this function for small tensors that live through most of a step. In glibc's memory, such tensors would
        fragment the free space.

        Args:
            x: tensor to copy.
            lasting: whether the copy lives until the end of a step, like a weight gradient.
        """
        return x if self.host_memory is None or x.device.type != "cpu" else self.empty_like(x, lasting).copy_(x)


ALLOCATOR = Allocator()
"""Allocator for all ops. There is one per process, because glibc's memory settings apply to the whole process."""
