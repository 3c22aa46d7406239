"""Measures a device's highest rates, with a large matrix product in each dtype and a large copy."""

from functools import partial
from typing import Any

import torch

from beit3_ds.benchmarks.certify.clock import Clock
from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import Recorder
from beit3_ds.benchmarks.certify.results import ResultsFile
from beit3_ds.benchmarks.kernels.roofline import GPU, GPUS
from beit3_ds.benchmarks.turns import device_of_turns

HALF_PRODUCT = "product in bfloat16"
"""Name of the measurement of bfloat16 matrix products. The measured rate is the ceiling for training steps."""
_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26, "dry": 1 << 16}
_WIDTHS = {"cuda": 8192, "cpu": 512, "dry": 64}
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(recorder: Recorder) -> None:
    """Measures the highest rate of matrix products in each dtype and the highest rate of copies; records all."""
    device = device_of_turns()
    clock = Clock(device)
    for dtype in _DTYPES:
        recorder.measure(f"product in {str(dtype).removeprefix('torch.')}", partial(_product, clock, dtype))
    recorder.measure("copy", partial(_copy, clock))


def measured_flops(recorder: Recorder) -> float | None:
    """Returns the last recorded peak rate of bfloat16 matrix products in FLOP/s; None if no rate has been recorded."""
    lines = ResultsFile(recorder.folder / "results.jsonl").read()
    rates = [line["tflops"] for line in lines if line.get("item") == HALF_PRODUCT and "tflops" in line]
    return rates[-1] * 1e12 if rates else None


def published(device: torch.device) -> GPU | None:
    """Returns the data sheet's rates for a device; None if `roofline` does not list the device."""
    if kind_of(device) == "cpu":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((gpu for key, gpu in GPUS.items() if key.split("-")[0] in name), None)


def _product(clock: Clock, dtype: torch.dtype) -> dict[str, Any]:
    width = _WIDTHS[clock.kind]
    a, b, out = (torch.randn(width, width, device=clock.device).to(dtype) for _ in range(3))
    timing = clock.time(lambda _: torch.mm(a, b, out=out), 10)
    rate = 2 * width**3 / min(timing.milliseconds) / 1e9
    gpu = published(clock.device)
    peak = None if gpu is None else (gpu.float32_flops if dtype == torch.float32 else gpu.half_flops) / 1e12
    return {"width": width, **timing.describe(), "tflops": rate, "data_sheet_tflops": peak}


def _copy(clock: Clock) -> dict[str, Any]:
    num_bytes = _COPY_BYTES[clock.kind]
    source, target = (torch.zeros(num_bytes, dtype=torch.int8, device=clock.device) for _ in range(2))
    timing = clock.time(lambda _: target.copy_(source), 10)
    gpu = published(clock.device)
    rate = 2 * num_bytes / min(timing.milliseconds) / 1e6
    return {
        "bytes": num_bytes,
        **timing.describe(),
        "gb_per_s": rate,
        "data_sheet_gb_per_s": gpu and gpu.bandwidth / 1e9,
    }
