"""Floating-point operations of the model, and how many this device could do."""

import time

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig

_PEAK_BF16 = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bf16 peaks from NVIDIA's data sheets, by a word in the device's name."""


def training_flops(config: ModelConfig, batch: PackedBatch) -> int:
    """Operations of forward and backward (3 x forward) of one micro-batch; a multiply-add counts 2.

    Counts matrix products only, as model FLOPs utilisation is usually stated: no recomputation, no padding, no
    optimizer and no visual tokenizer.
    """
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    linear = 2 * batch.num_rows * (4 * hidden * hidden + 2 * hidden * ffn)
    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    attention = sum(4 * length * length * hidden for length in lengths)
    image_mim, text_mlm, pair_mim, pair_mlm = batch.num_masked
    heads = (
        2
        * hidden
        * ((image_mim + pair_mim) * config.visual_vocab_size + (text_mlm + pair_mlm) * config.text_vocab_size)
    )
    patches = 2 * batch.patch_mask.numel() * 3 * config.patch_size**2 * hidden
    return 3 * (config.num_layers * (linear + attention) + heads + patches)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that `device` could do: the data sheet's figure for known GPUs, else a measured product."""
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
