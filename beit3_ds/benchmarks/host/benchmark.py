"""Measures the host's CPU time for a training step: kernel launches per layer, and the hooks of ZeRO-3."""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from beit3_ds.benchmarks.host.layers import LayerTimes, layer_models, time_layer
from beit3_ds.benchmarks.host.zero3 import NUM_LAYERS
from beit3_ds.benchmarks.medians import median_with_interval
from beit3_ds.benchmarks.turns import TurnProcess

_PLAIN, _ZERO3 = "without ZeRO", "ZeRO-3"
_STAGES = {_PLAIN: 0, _ZERO3: 3}

Round = dict[str, dict[str, Any]]
"""Figures of one round: maps the name of a ZeRO stage to figures by name."""


def benchmark_host(rounds: int = 15, json_path: str | None = None) -> str:
    """Measures the host's time for kernel launches and for ZeRO-3's hooks, in CPU time of one thread; returns a report.

    Kernel launches are measured on an emulated GPU whose kernels do nothing (`fake_driver`). The measured layers are
    narrow, and are built like those of the base and giant models. ZeRO-3's hooks are measured on the CPU, with a model
    of 40 narrow layers on one rank. Steps with ZeRO-3 and steps without ZeRO run in turn; all of them include an
    optimizer update.

    Args:
        rounds: number of measured rounds.
        json_path: file for the results as JSON, with `rows` and `summary`. In `summary`, `base_layer_ms` and
            `giant_layer_ms` are the median milliseconds of one layer, for the forward and backward pass together.
            `zero3_ratio` is the time of a step with ZeRO-3 divided by the time of a step without ZeRO, median over
            rounds.
    """
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        layers = {name: time_layer(config, rounds) for name, config in layer_models().items()}
        steps = _time_steps(rounds)
    finally:
        torch.set_num_threads(num_threads)
    ratio = median_with_interval([row[_ZERO3]["cpu_seconds"] / row[_PLAIN]["cpu_seconds"] for row in steps])
    summary = {f"{name}_layer_ms": times.total_ms for name, times in layers.items()}
    summary |= {"zero3_ratio": ratio["median"], "low": ratio["low"], "high": ratio["high"]}
    if json_path:
        rows = {"layers": {name: times._asdict() for name, times in layers.items()}, "steps": steps}
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    return _describe(layers, steps, ratio)


def _time_steps(rounds: int) -> list[Round]:
    """Measures training steps with and without ZeRO-3 for `rounds` rounds, and returns the figures of each round.

    In each round, two processes train one step each, one after the other: one process with ZeRO-3, the other without
    ZeRO. Two warm-up rounds run first, and their figures are dropped.
    """
    rows: list[Round] = []
    workers: dict[str, TurnProcess] = {}
    try:
        for name, stage in _STAGES.items():
            workers[name] = TurnProcess(name, "beit3_ds.benchmarks.host.zero3", (str(stage),))
        for number in range(rounds + 2):
            order = list(_STAGES) if number % 2 == 0 else list(_STAGES)[::-1]
            rows.append({name: workers[name].take_turn(number) for name in order})
            print(f"round {number} of {rounds + 1}", file=sys.stderr, flush=True)
    finally:
        for worker in workers.values():
            worker.stop()
    return rows[2:]


def _describe(layers: dict[str, LayerTimes], steps: list[Round], ratio: dict[str, float]) -> str:
    lines = ["| layer of | forward (ms) | backward (ms) | both (ms) | launches |", "|---|---|---|---|---|"]
    for name, times in layers.items():
        milliseconds = " | ".join(f"{value:.2f}" for value in times[:3])
        lines.append(f"| {name} | {milliseconds} | {times.forward_launches:.0f} + {times.backward_launches:.0f} |")
    lines += ["", f"| step of {NUM_LAYERS} narrow layers | CPU time (ms) |", "|---|---|"]
    for name in _STAGES:
        median = median_with_interval([row[name]["cpu_seconds"] for row in steps])["median"]
        lines.append(f"| {name} | {1e3 * median:.0f} |")
    lines.append(f"\nratio: {ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})")
    return "\n".join(lines)
