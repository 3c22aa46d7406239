"""Makes the device of a kernel's operands the current CUDA device, because Triton launches kernels there."""

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def make_current(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context manager that makes `device` the current CUDA device; does nothing for other types of devices.

    PyTorch's own operations need no such context manager. In a backward pass, the gradients' device is already current.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _UNCHANGED
    return torch.cuda.device(device)
