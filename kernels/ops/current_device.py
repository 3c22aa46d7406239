"""Makes a tensor's CUDA device the current device, because Triton launches kernels on the current device."""

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def make_current(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context manager that makes `device` the current CUDA device. For a CPU, it does nothing.

    Triton kernels need this context manager, and PyTorch's own operations do not. In a backward pass, autograd has
    already made the gradients' device current.
    """
    return _UNCHANGED if is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    """Returns whether `device` is the current CUDA device; always true for a CPU."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())
