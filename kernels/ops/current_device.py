"""Makes the device of a kernel's operands the current CUDA device, because Triton launches kernels there."""

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def make_current(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context manager that makes `device` the current CUDA device; does nothing for other types of devices.

    PyTorch's own operations need no such context manager. In a backward pass, the gradients' device is already current.
    """
    return _UNCHANGED if is_current(device) else torch.cuda.device(device)


def is_current(device: torch.device) -> bool:
    """Returns whether `device` is the current CUDA device; always true for devices of another type."""
    return device.type != "cuda" or device.index in (None, torch.cuda.current_device())
