"""Counts the floating-point operations of training and gives the peak of the device."""

import time

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.model.flops import layer_flops, work_of
from beit3_ds.tasks import Task

_PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peaks from NVIDIA's data sheets, in FLOP/s, by a word in the device name."""


def training_flops(task: Task, batch: PackedBatch) -> float:
    """Returns the operations of one micro-batch's forward and backward (3 x forward); a multiply-add counts 2.

    Counts matrix products only: no recomputation, no padding, no optimizer and no frozen network.
    """
    return 3 * sum(layer_flops(task.config.model, work_of(batch, task.head_flops(batch.term_counts))))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Returns the peak FLOP/s of a device: from the data sheet for bf16 on known GPUs, else a measured product's."""
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
