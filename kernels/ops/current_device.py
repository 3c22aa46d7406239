"""Makes the device of a kernel's operands the current CUDA device, because Triton launches on the current one."""

from contextlib import AbstractContextManager, nullcontext

import torch

_UNCHANGED = nullcontext()


def make_current(device: torch.device) -> AbstractContextManager[None]:
    """Returns a context manager in which `device` is the current CUDA device; it changes nothing for another type.

    PyTorch's own operations switch devices themselves, and threads of a backward pass run on the device of the
    gradients.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _UNCHANGED
    return torch.cuda.device(device)
