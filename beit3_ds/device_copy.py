"""Copies tensors from the host to a device without waiting for the device."""

import torch
from torch import Tensor

HOST = torch.device("cpu")
"""Host memory."""


def copy_to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor on `device`; the host does not wait for the device, which copies the memory in stream order.

    A tensor in host memory is first copied to pinned memory, which torch's allocator keeps until the device has read
    it. From other memory, the copy would begin only after all queued work of the device.
    """
    if tensor.device != HOST or device == HOST or device.type == "meta":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
