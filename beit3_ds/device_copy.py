"""Copies tensors from the host to a device without waiting for the device."""

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""Device of tensors in host memory."""


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on `device`. The copy runs in CUDA stream order, and the host does not wait for it.

    A host tensor is first copied to pinned memory, which torch's allocator keeps until the device has read it. Without
    pinned memory, the host would wait until the device has finished all queued work.
    """
    if tensor.device != HOST or device == HOST or device.type == "meta":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
