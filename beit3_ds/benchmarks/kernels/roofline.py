"""The least time that a GPU's published peak rates allow an op: a model, never a measurement."""

from typing import NamedTuple

import torch

from beit3_ds.config import ConfigError


class GPU(NamedTuple):
    """Peak rates from the vendor's data sheet, dense."""

    half_flops: float
    """bfloat16 or float16 on tensor cores, FLOP/s."""
    float32_flops: float
    """float32 without tensor cores, FLOP/s."""
    bandwidth: float
    """Memory, bytes a second."""

    def floor_seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """The roofline: products at the peak rate, or the bytes at full bandwidth, whichever takes longer."""
        peak = self.float32_flops if dtype == torch.float32 else self.half_flops
        return max(flops / peak, num_bytes / self.bandwidth)


GPUS = {
    "a100-80gb": GPU(312e12, 19.5e12, 2.039e12),
    "h100-sxm": GPU(989.4e12, 66.9e12, 3.35e12),
    "h200-sxm": GPU(989.4e12, 66.9e12, 4.8e12),
    "b200": GPU(2250e12, 75e12, 8.0e12),
}
"""NVIDIA's data sheets of A100 80GB SXM, H100 SXM, H200 SXM and B200 (a GPU of HGX B200)."""


def find_gpu(name: str) -> GPU:
    """Looks a GPU up by name.

    Raises:
        ConfigError: if there is none of this name.
    """
    if name not in GPUS:
        raise ConfigError(f"model of a GPU: {name!r} is not one of {', '.join(map(repr, GPUS))}.")
    return GPUS[name]
