"""Measures time, rate and peak memory of each op and its baselines, at the shapes of a model size.

The rate is also given as a share of the device's ceiling. A ceiling is the highest measured rate of a large matrix
product or a large copy.
"""

import csv
import ctypes
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from beit3_ds.benchmarks.kernels.case import Case, Problem
from beit3_ds.benchmarks.kernels.cases import build_cases
from beit3_ds.benchmarks.kernels.roofline import find_gpu
from beit3_ds.benchmarks.peak_memory import peak_bytes, reset_peak, status_bytes

_ROUNDS = {"cuda": 30, "cpu": 5}
_WARMUP = {"cuda": 5, "cpu": 1}
_CACHE_BYTES = 256 << 20  # larger than any L2 cache, so that no kernel finds data of the previous round there


class Row(NamedTuple):
    """Holds one row of the table: the figures of one implementation of an op in one direction."""

    op: str
    """Name of the op."""
    shape: str
    """Model size and shape of the op's inputs."""
    dtype: str
    """dtype of the inputs, for example "bfloat16"."""
    implementation: str
    """Name of the implementation: "beit3_ds", or the name of a baseline."""
    direction: str
    """Timed pass: "forward", "backward" or "both"."""
    median_ms: float
    """Median milliseconds per pass."""
    p20_ms: float
    """20th percentile of the milliseconds per pass."""
    p80_ms: float
    """80th percentile of the milliseconds per pass."""
    rate: float
    """TFLOP/s of the op's matrix products, or GB/s for the minimum number of bytes that the op reads and writes."""
    unit: str
    """Unit of the rate: "TFLOP/s" or "GB/s"."""
    ceiling_share: float
    """Rate divided by the device's measured ceiling for matrix products or copies (`Ceilings`)."""
    peak_mb: float
    """Peak memory during forward and backward in MB, minus the memory before."""
    modelled_floor_ms: float | None
    """Modelled minimum milliseconds per pass on the GPU given to `benchmark_kernels`; None if no GPU was given."""


class Ceilings(NamedTuple):
    """Holds the highest rates that were measured on this device, for a large matrix product and a large copy."""

    flops: float
    """FLOP/s of a large matrix product."""
    bytes: float
    """Bytes per second that a large copy reads and writes in total."""


def benchmark_kernels(
    sizes: Sequence[str], samples: int, dtype: torch.dtype, gpu: str | None = None, csv_path: str | None = None
) -> str:
    """Measures all ops and baselines and returns a report.

    For each op, the results of all implementations are compared first. Then the implementations are timed in turn.

    Args:
        sizes: model sizes, for example "base" and "giant".
        samples: number of images in the micro-batch, equal to the number of pairs and to the number of texts
            (`mix.draw_mix`).
        dtype: dtype of all tensors.
        gpu: key of `roofline.GPUS`, to add a column with modelled minimum times on that GPU; None for no column.
        csv_path: CSV file for all rows, with device and versions; None for no file.
    """
    modelled = find_gpu(gpu) if gpu else None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ceilings = _measure_ceilings(device, dtype)
    rows, absent = [], []
    for size in sizes:
        for build in build_cases(size, samples, device, dtype):
            case = build()
            print(f"{case.op} {case.shape}", file=sys.stderr, flush=True)
            absent += [f"{case.op}: {name} is absent ({why})" for name, why in case.absent()]
            times, peaks = _measure(case, device)
            for name, direction in times:
                cost = case.cost(direction)
                floor = modelled.floor_seconds(cost.flops, cost.bytes, dtype) * 1e3 if modelled else None
                rows.append(
                    _row(case, name, direction, times[name, direction], peaks[name], ceilings, _name(dtype), floor)
                )
    described = _describe_device(device)
    if csv_path:
        with open(csv_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([*described, *Row._fields])
            writer.writerows([[*described.values(), *row] for row in rows])
    return _describe(rows, sorted(set(absent)), described, ceilings, gpu)


def _measure(case: Case, device: torch.device) -> tuple[dict[tuple[str, str], list[float]], dict[str, float]]:
    """Times all implementations of an op.

    Returns:
        The seconds of each round, by implementation and direction. Then the peak bytes, by implementation.
    """
    problems = {entry.name: entry.build() for entry in case.implementations if entry.build}
    _compare(problems)
    peaks = {name: _peak(problem, device) for name, problem in problems.items()}
    times: dict[tuple[str, str], list[float]] = {
        (name, direction): [] for name in problems for direction in ("forward", "backward", "both")
    }
    cache = torch.empty(_CACHE_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None
    for number in range(_WARMUP[device.type] + _ROUNDS[device.type]):
        for name, problem in problems.items():
            if cache is not None:
                cache.zero_()
            forward, backward = _time(problem, device)
            if number >= _WARMUP[device.type]:
                for direction, seconds in (("forward", forward), ("backward", backward), ("both", forward + backward)):
                    times[name, direction].append(seconds)
    return times, peaks


def _time(problem: Problem, device: torch.device) -> tuple[float, float]:
    """Returns the seconds of one forward pass and of one backward pass."""
    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    outputs: list[torch.Tensor] = []
    forward = clock(lambda: outputs.append(problem.run()))
    backward = clock(lambda: torch.autograd.grad(outputs[0], problem.leaves, problem.dy))
    return forward, backward


def _cpu_clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _cuda_clock(work: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _compare(problems: dict[str, Problem]) -> None:
    """Asserts that all implementations compute nearly equal results."""
    expected: torch.Tensor | None = None
    for name, problem in problems.items():
        y = problem.packed(problem.run()).detach().float()
        if expected is None:
            expected = y
        error = ((y - expected).norm() / expected.norm()).item()
        assert error < 2e-2, f"{name} differs from {next(iter(problems))} by {error:.2g} of its norm"


def _peak(problem: Problem, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(problem.run(), problem.leaves, problem.dy)
        torch.cuda.synchronize()
        return float(torch.cuda.max_memory_allocated() - before)
    ctypes.CDLL(None).malloc_trim(0)  # because memory that was freed before could hide the peak
    reset_peak()
    before = status_bytes("self", "VmRSS")
    torch.autograd.grad(problem.run(), problem.leaves, problem.dy)
    return float(max(0, peak_bytes() - before))


def _measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    width = 8192 if device.type == "cuda" else 1024
    a, b, out = (torch.randn(width, width, device=device).to(dtype) for _ in range(3))
    source, target = (torch.zeros(_CACHE_BYTES, dtype=torch.int8, device=device) for _ in range(2))
    clock = _cuda_clock if device.type == "cuda" else _cpu_clock
    product = min(clock(lambda: torch.mm(a, b, out=out)) for _ in range(10))
    copy = min(clock(lambda: target.copy_(source)) for _ in range(10))
    return Ceilings(2 * width**3 / product, 2 * _CACHE_BYTES / copy)


def _row(
    case: Case,
    name: str,
    direction: str,
    seconds: list[float],
    peak: float,
    ceilings: Ceilings,
    dtype: str,
    floor_ms: float | None,
) -> Row:
    cost = case.cost(direction)
    median = statistics.median(seconds)
    p20, *_, p80 = statistics.quantiles(seconds, n=5)
    if case.is_compute_bound:
        rate, unit, share = cost.flops / median / 1e12, "TFLOP/s", cost.flops / median / ceilings.flops
    else:
        rate, unit, share = cost.bytes / median / 1e9, "GB/s", cost.bytes / median / ceilings.bytes
    times = (median * 1e3, p20 * 1e3, p80 * 1e3)
    return Row(case.op, case.shape, dtype, name, direction, *times, rate, unit, share, peak / 1e6, floor_ms)


def _describe_device(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({torch.get_num_threads()} threads)"
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": platform.python_version(),
    }


def _triton_version() -> str:
    try:
        import triton
    except ImportError:  # torch's builds for CPUs do not contain Triton
        return "absent"
    return str(triton.__version__)


def _describe(
    rows: Sequence[Row], absent: Sequence[str], described: dict[str, str], ceilings: Ceilings, gpu: str | None
) -> str:
    floor = f" modelled floor on {gpu} (ms) |" if gpu else ""
    lines = [
        ", ".join(f"{key} {value}" for key, value in described.items()),
        f"ceilings, measured: products {ceilings.flops / 1e12:.3g} TFLOP/s, copying {ceilings.bytes / 1e9:.3g} GB/s",
    ]
    if described["device"].startswith("CPU"):
        lines.append("No CUDA device: the ops run in their CPU form. docs/kernels.md says which kernels ran on a GPU.")
    lines += [
        "",
        "| op | shape | dtype | implementation | direction | ms: median (p20 to p80) | rate | of the ceiling | "
        f"peak (MB) |{floor}",
        "|---" * (10 if gpu else 9) + "|",
    ]
    for row in rows:
        cells = [row.op, row.shape, row.dtype, row.implementation, row.direction]
        cells += [f"{row.median_ms:.4g} ({row.p20_ms:.4g} to {row.p80_ms:.4g})", f"{row.rate:.3g} {row.unit}"]
        cells += [f"{row.ceiling_share:.2f}", f"{row.peak_mb:.0f}"]
        cells += [f"{row.modelled_floor_ms:.4g}"] if row.modelled_floor_ms is not None else []
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *absent])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
