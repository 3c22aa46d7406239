"""Models the minimum time of an op from the published peak rates of a GPU."""

from typing import NamedTuple

import torch

from beit3_ds.config import ConfigError


class GPU(NamedTuple):
    """Holds a GPU's peak rates for dense matrices, from the vendor's data sheet."""

    half_flops: float
    """FLOP/s in bfloat16 or float16 with tensor cores."""
    float32_flops: float
    """FLOP/s in float32 without tensor cores."""
    bandwidth: float
    """Memory bandwidth in bytes per second."""

    def floor_seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """Returns an op's minimum seconds: the time for the FLOPs or for the bytes, whichever is longer."""
        peak = self.float32_flops if dtype == torch.float32 else self.half_flops
        return max(flops / peak, num_bytes / self.bandwidth)


GPUS = {
    "a100-80gb": GPU(312e12, 19.5e12, 2.039e12),
    "h100-sxm": GPU(989.4e12, 66.9e12, 3.35e12),
    "h200-sxm": GPU(989.4e12, 66.9e12, 4.8e12),
    "b200": GPU(2250e12, 75e12, 8.0e12),
}
"""Peak rates of A100 80GB SXM, H100 SXM, H200 SXM and B200 (one GPU of HGX B200), from NVIDIA's data sheets."""


def find_gpu(name: str) -> GPU:
    """Returns the GPU with this name in `GPUS`.

    Raises:
        ConfigError: if no GPU has this name.
    """
    if name not in GPUS:
        raise ConfigError(f"the GPU {name!r} is not one of {', '.join(map(repr, GPUS))}.")
    return GPUS[name]
