"""Compares this project with torchscale's BEiT-3 (the reference) in fine-tuning and caption generation.

Caption generation also includes BLIP base, if the package transformers is installed. All implementations get the same
samples in each round.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from beit3_ds.benchmarks.finetune.cases import CASES, case_config
from beit3_ds.benchmarks.finetune.decoding import has_blip
from beit3_ds.benchmarks.medians import median_with_interval
from beit3_ds.benchmarks.step.reference import check_torchscale
from beit3_ds.benchmarks.turns import TurnProcess
from beit3_ds.config import ConfigError

OURS, REFERENCE, BLIP = "beit3_ds", "torchscale", "blip"
"""Names of the compared implementations. BLIP base takes part only in caption generation."""
DECODING = "decoding"
"""Name of the task that generates captions."""
DECODED_IMAGES = 16
"""Number of images for which each measured round generates captions."""

Row = dict[str, dict[str, Any]]
"""Figures of one round: maps the name of an implementation to figures by name."""


def benchmark_finetune(
    size: str = "base",
    samples: int = 4,
    rounds: int = 7,
    image_size: int | None = None,
    tasks: Sequence[str] = (*CASES, DECODING),
    json_path: str | None = None,
) -> str:
    """Measures this project and the reference on each task, and returns a report.

    Each implementation has its own process, and only one process computes at a time. In each round, every
    implementation computes one batch. The order of the implementations alternates between rounds, and a first round
    warms up. Speed ratios are medians over rounds with 95% confidence intervals. The reference is torchscale's BEiT-3
    with the heads and beam search of microsoft/unilm. On a CPU all implementations compute in float32.

    Args:
        size: model size.
        samples: samples per training step.
        rounds: measured rounds of training. Caption generation has half as many, but at least one.
        image_size: height and width of images in pixels. None means the size in the reference's recipe for each task.
        tasks: tasks to measure, from `CASES` and `DECODING`.
        json_path: file for the results as JSON, with `rows` by task and `summary`. In `summary`, `ratio_TASK` is this
            project's speed divided by the reference's. `memory_ratio_TASK` is this project's peak memory divided by the
            reference's. `memory_ratio` is the largest `memory_ratio_TASK` of the training tasks; None without training
            tasks. `ratio_blip` is this project's speed of caption generation divided by BLIP base's; None if BLIP was
            not measured, for example because the package transformers is missing.

    Raises:
        ConfigError: if torchscale is not installed, if the size is unknown, or if the JSON file cannot be written.
    """
    for task in CASES:
        case_config(task, size, image_size)
    check_torchscale()
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"{json_path}: cannot be written: there is no such folder.")
    rows = {task: _measure(task, size, samples, rounds, image_size) for task in tasks}
    summary = _summarize(rows) | {
        "size": size,
        "samples": samples,
        "image_size": image_size,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    return _describe(rows, summary)


def _measure(task: str, size: str, samples: int, rounds: int, image_size: int | None) -> list[Row]:
    sides = [OURS, REFERENCE, *([BLIP] if task == DECODING and has_blip() else [])]
    count, rounds = (DECODED_IMAGES, max(1, rounds // 2)) if task == DECODING else (samples, rounds)
    rows: list[Row] = []
    processes: dict[str, TurnProcess] = {}
    try:
        for side in sides:
            arguments = (task, side, size, str(image_size or 0), str(count))
            processes[side] = TurnProcess(f"{task}, {side}", "beit3_ds.benchmarks.finetune.worker", arguments)
        for number in range(rounds + 1):
            # The order alternates, so that no side gains if the machine slows down.
            order = sides if number % 2 == 0 else sides[::-1]
            row = {side: processes[side].take_turn(number) for side in order}
            seconds = ", ".join(f"{side} {figures['seconds']:.2f} s" for side, figures in row.items())
            name = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{task}: {name}: {seconds}", file=sys.stderr, flush=True)
            rows.append(row)
    finally:
        for process in processes.values():
            process.stop()
    return rows[1:]


def _summarize(rows: dict[str, list[Row]]) -> dict[str, Any]:
    intervals, memory = {}, {}
    for task, rounds in rows.items():
        intervals[f"ratio_{task}"] = _ratio(rounds, REFERENCE)
        memory[f"memory_ratio_{task}"] = rounds[-1][OURS]["peak_bytes"] / rounds[-1][REFERENCE]["peak_bytes"]
        if BLIP in rounds[0]:
            intervals["ratio_blip"] = _ratio(rounds, BLIP)
    trained = [memory[f"memory_ratio_{task}"] for task in rows if task != DECODING]
    return {
        "ratio_blip": None,
        **{name: interval["median"] for name, interval in intervals.items()},
        **memory,
        "memory_ratio": max(trained, default=None),
        "intervals": intervals,
    }


def _ratio(rows: list[Row], side: str) -> dict[str, float]:
    return median_with_interval([row[side]["seconds"] / row[OURS]["seconds"] for row in rows])


def _describe(rows: dict[str, list[Row]], summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['size']}; {summary['device']}, {summary['threads']} threads; sides in turn, median (95% interval); "
        f"torch {summary['torch']}",
        "",
        "| task | side | seconds | samples/s | speed of beit3_ds over it | peak memory (GiB) |",
        "|---|---|---|---|---|---|",
    ]
    for task, rounds in rows.items():
        for side in rounds[0]:
            seconds = median_with_interval([row[side]["seconds"] for row in rounds])
            rate = rounds[0][side]["samples"] / seconds["median"]
            ratio = "" if side == OURS else _show(_ratio(rounds, side))
            cells = [task, side, _show(seconds), f"{rate:.2f}", ratio, f"{rounds[-1][side]['peak_bytes'] / 2**30:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    figures = [f"{name} {_show(interval)}" for name, interval in summary["intervals"].items()]
    if summary["memory_ratio"] is not None:
        figures.append(f"memory_ratio {summary['memory_ratio']:.2f}")
    if DECODING in rows and summary["ratio_blip"] is None:
        figures.append("ratio_blip unavailable: transformers is not installed")
    return "\n".join([*lines, "", ", ".join(figures)])


def _show(values: dict[str, float]) -> str:
    return f"{values['median']:.2f} ({values['low']:.2f} to {values['high']:.2f})"
