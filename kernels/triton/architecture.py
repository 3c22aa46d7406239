"""Determines whether a tensor is on a real or emulated GPU, and which GPU architecture's kernel settings apply."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}
"""Number of multiprocessors per GPU, by architecture: A100 (80), H100 (90) and B200 (100)."""


class EmulatedGPU:
    """Makes operators treat the CPU as a GPU, so that they launch GPU kernels for CPU tensors (`fake_driver`)."""

    def __init__(self) -> None:
        """Starts without an emulated GPU."""
        self.architecture: int | None = None
        """Architecture of the emulated GPU: 80, 90 or 100; None without emulation."""

    @contextmanager
    def set(self, architecture: int) -> Iterator[None]:
        """Emulates a GPU of the given architecture (80, 90 or 100) inside a `with` block."""
        before, self.architecture = self.architecture, architecture
        try:
            yield
        finally:
            self.architecture = before


EMULATED = EmulatedGPU()
"""The emulated GPU of this process. It is inactive until `set` is called."""


def is_on_gpu(x: Tensor) -> bool:
    """Returns whether `x` is on a GPU, or this process emulates a GPU."""
    return x.is_cuda or EMULATED.architecture is not None


def architecture_of(device: torch.device) -> int:
    """Returns the GPU architecture whose kernel settings are used on a device: 80, 90 or 100.

    The value is 90 or 100 for GPUs of these generations, and 80 for all other GPUs and for the CPU.
    """
    if EMULATED.architecture is not None:
        return EMULATED.architecture
    if device.type != "cuda":
        return 80
    return _architecture_of_gpu(device)


@lru_cache
def _architecture_of_gpu(device: torch.device) -> int:
    major, _ = torch.cuda.get_device_capability(device)
    return {9: 90, 10: 100}.get(major, 80)
