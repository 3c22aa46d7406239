"""Profiles training steps on a GPU: the time of each kernel, and the share of time in which the GPU is idle."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from beit3_ds.benchmarks.certify.device_kind import kind_of
from beit3_ds.benchmarks.certify.recorder import NeedsDeviceError, Recorder
from beit3_ds.benchmarks.certify.steps import Model, models, our_step, timed_batch
from beit3_ds.benchmarks.turns import device_of_turns

_STEPS = 3
_KERNELS = 25


def measure(recorder: Recorder) -> None:
    """Records for each model the share of idle time, and the time of each of the 25 slowest kernels."""
    device = device_of_turns()
    if kind_of(device) == "cpu":
        raise NeedsDeviceError
    for model in models(device):
        recorder.measure(model.name, partial(_profile, recorder, model, device))


def idle_share(intervals: Sequence[tuple[float, float]]) -> float:
    """Returns the share of time in which no kernel runs, between the first start and the last end of a kernel.

    Args:
        intervals: start and end time of each kernel, in any order and unit. Intervals may overlap.
    """
    busy, end = 0.0, float("-inf")
    ordered = sorted(intervals)
    for start, stop in ordered:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / (end - ordered[0][0])


def _profile(recorder: Recorder, model: Model, device: torch.device) -> dict[str, Any]:
    config = model.config()
    step = our_step(config, timed_batch(config, device), "auto")
    for _ in range(4):
        step()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_STEPS):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() or () if event.device_type == torch.autograd.DeviceType.CUDA]
    if not kernels:
        return {"not_run": "the profiler saw no kernels"}
    intervals = [(event.time_range.start, event.time_range.end) for event in kernels]
    times, numbers = Counter[str](), Counter[str]()
    for event, (start, end) in zip(kernels, intervals, strict=True):
        times[event.name] += end - start
        numbers[event.name] += 1
    total = sum(times.values())
    for name, microseconds in times.most_common(_KERNELS):
        figures = {"ms_per_step": microseconds / 1e3 / _STEPS, "share": microseconds / total}
        recorder.add(f"{model.name}: {name[:100]}", **figures, launches_per_step=numbers[name] / _STEPS)
    return {
        "idle_share": idle_share(intervals),
        "kernel_ms_per_step": total / 1e3 / _STEPS,
        "launches_per_step": len(kernels) / _STEPS,
    }
