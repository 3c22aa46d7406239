"""Selects the GPU architecture whose kernel settings a device uses."""

import torch

NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Number of multiprocessors of an A100 (architecture 80), an H100 (90) and a B200 (100)."""


def architecture_of(device: torch.device) -> int:
    """Returns the architecture whose kernel settings a device uses: 90 or 100, or 80 for all other GPUs and the CPU."""
    if device.type != "cuda":
        return 80
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
