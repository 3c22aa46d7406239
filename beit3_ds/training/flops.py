"""Determines a device's peak FLOP/s, the denominator of model FLOPs utilization (MFU)."""

import time

import torch

_PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peak in FLOP/s from NVIDIA's data sheets, by a word in the device name."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the peak FLOP/s of a device: NVIDIA's value for bfloat16 on known GPUs, a measured rate in all other
    cases.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for word, peak in _PEAK_BF16.items():
            if word in name:
                return peak
    return _measure_matmul(device, dtype)


def _measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    size, best = 1024, float("inf")
    x = torch.randn(size, size, device=device, dtype=dtype)
    for _ in range(4):
        start = time.perf_counter()
        y = x @ x
        y[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
