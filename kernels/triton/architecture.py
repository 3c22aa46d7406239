"""Lists the architectures that the GPU kernels are compiled for."""

import torch

NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Multiprocessors of an A100, an H100 and a B200, on which the number of programs depends."""


def architecture_of(device: torch.device) -> int:
    """Returns the GPU architecture (80, 90 or 100) whose kernel settings a device uses; 80 without a GPU."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
