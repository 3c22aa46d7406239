"""Compares detection, segmentation and window attention with other implementations, in one process."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from beit3_ds.config import ConfigError


def benchmark_dense(parts: Sequence[str], rounds: int, json_path: str | None = None) -> str:
    """Runs the comparisons one after another and returns the results as text.

    Args:
        parts: comparisons to run, as keys of `MEASURES`.
        rounds: measured rounds per comparison. In each round, the implementations run in turn.
        json_path: file for the results as JSON. `rows` has the figures of each comparison. `summary` has
            `ratio_coco_eval`, `ratio_window_attention`, `images_per_second_detection`,
            `images_per_second_segmentation`, `threads`, `torch` (its version) and `load_average`.

    Raises:
        ConfigError: if the folder of the JSON file does not exist, or a package for a comparison is not installed.
        OSError: if the JSON file cannot be written.
    """
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"{json_path}: cannot be written: there is no such folder.")
    rows = {part: MEASURES[part](rounds) for part in parts}
    figures = {name: value for row in rows.values() for name, value in row.items()}
    names = ("ratio_coco_eval", "ratio_window_attention", "images_per_second_detection")
    summary = {name: figures.get(name) for name in (*names, "images_per_second_segmentation")}
    summary |= {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": os.getloadavg()[0],
    }
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    lines = [f"{summary['threads']} threads; sides in turn, medians; torch {summary['torch']}"]
    for part, row in rows.items():
        lines += ["", part, *(f"  {name}  {_show(value)}" for name, value in row.items())]
    return "\n".join(lines)


def _measure_windows(rounds: int) -> dict[str, Any]:
    from beit3_ds.benchmarks.dense.windows import measure_windows

    return measure_windows(rounds)


def _measure_coco_eval(rounds: int) -> dict[str, Any]:
    from beit3_ds.benchmarks.dense.coco_eval import measure_coco_eval

    return measure_coco_eval(rounds)


def _measure_detection(rounds: int) -> dict[str, Any]:
    from beit3_ds.benchmarks.dense.detection import measure_detection

    return measure_detection(rounds)


def _measure_segmentation(rounds: int) -> dict[str, Any]:
    from beit3_ds.benchmarks.dense.segmentation import measure

    figures = measure(rounds)._asdict()
    return {"images_per_second_segmentation": figures["training_images_per_second"], **figures}


MEASURES: dict[str, Callable[[int], dict[str, Any]]] = {
    "windows": _measure_windows,
    "coco_eval": _measure_coco_eval,
    "detection": _measure_detection,
    "segmentation": _measure_segmentation,
}
"""Functions by the name of the comparison that they run. Each function takes a number of rounds and returns the
figures."""


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
