"""Compares this project's training step with torchscale's training step for BEiT-3, and with the model's matrix
products alone.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from beit3_ds.benchmarks.medians import median_with_interval
from beit3_ds.benchmarks.step.batches import STREAMS, step_config
from beit3_ds.benchmarks.step.reference import check_torchscale
from beit3_ds.benchmarks.turns import TurnProcess
from beit3_ds.config import ConfigError

OURS, REFERENCE, PRODUCTS = "beit3_ds", "torchscale", "products"
"""Names of the three measured processes: this project's step, the reference's step, and the matrix products alone."""

REFERENCE_TO_LONGEST = "torchscale, padded to the longest"
"""Name of the reference that pads texts to the batch's longest text. It is faster than the reference that pads to the
maximum length."""

Row = dict[str, dict[str, Any]]
"""Figures of one round. The outer key is the name of the measured process, and the inner key is the name of the figure.
"""


def benchmark_train(
    size: str = "base", samples: int = 4, rounds: int = 7, json_path: str | None = None, pads_to_longest: bool = False
) -> str:
    """Measures this project's step, the reference's step and the matrix products in turn, and returns a report.

    The three run in separate processes, one at a time. In each round, all three use the same batch. The third computes
    only the model's matrix products, which limit the speed. A first round warms up. Ratios are medians over rounds with
    95% confidence intervals. On a GPU, the steps run in bfloat16 (the reference under autocast). Peak memory comes from
    torch's allocator on a GPU, and is the VmHWM of the whole process on a CPU.

    Args:
        size: model size.
        samples: number of images per step, equal to the number of pairs and to the number of texts.
        rounds: number of measured rounds.
        pads_to_longest: True pads the reference's texts to the longest text of the batch. False pads them to the
            maximum text length of the data, as microsoft/unilm does.
        json_path: file for the results as JSON, with `rows` and `summary`. In `summary`, `ratio` is this project's
            samples per second divided by the reference's. `gemm_share` is the time of all matrix products of the model
            divided by the time of this project's step. `needed_gemm_share` leaves out rows that stochastic depth drops
            and rows that no head reads (`products.needed_flops`). `memory_ratio` is this project's peak memory divided
            by the reference's.

    Raises:
        ConfigError: if torchscale is not installed, if the size is unknown, or if the JSON file cannot be written.
    """
    step_config(size, samples)
    check_torchscale()
    if json_path and not Path(json_path).absolute().parent.is_dir():
        raise ConfigError(f"{json_path}: cannot be written: there is no such folder.")
    rows = _measure(size, samples, rounds, REFERENCE_TO_LONGEST if pads_to_longest else REFERENCE)
    summary = _summarize(rows) | {
        "size": size,
        "samples": samples * len(STREAMS),
        "reference_pads_to": "longest" if pads_to_longest else "limit",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
    }
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2) + "\n", encoding="utf-8")
    return _describe(rows, summary)


def _measure(size: str, samples: int, rounds: int, reference: str) -> list[Row]:
    rows = []
    workers: dict[str, TurnProcess] = {}
    try:
        for name, side in ((PRODUCTS, PRODUCTS), (OURS, OURS), (REFERENCE, reference)):
            workers[name] = TurnProcess(side, "beit3_ds.benchmarks.step.worker", (side, size, str(samples)))
        for number in range(rounds + 1):
            # The order alternates, so that neither side gains if the machine slows down.
            sides = (OURS, REFERENCE) if number % 2 == 0 else (REFERENCE, OURS)
            row = {side: workers[side].take_turn(number) for side in (PRODUCTS, *sides)}
            assert row[OURS]["masked"] == row[REFERENCE]["masked"], f"not the same samples: {row}"
            seconds = ", ".join(f"{side} {figures['seconds']:.2f} s" for side, figures in row.items())
            name = f"round {number} of {rounds}" if number else "warm-up"
            print(f"{name}: {seconds}", file=sys.stderr, flush=True)
            rows.append(row)
    finally:
        for worker in workers.values():
            worker.stop()
    return rows[1:]


def _summarize(rows: list[Row]) -> dict[str, Any]:
    def ratio(above: str, below: str, key: str = "seconds") -> dict[str, float]:
        return median_with_interval([row[above][key] / row[below][key] for row in rows])

    intervals = {
        "ratio": ratio(REFERENCE, OURS),
        "cpu_ratio": ratio(REFERENCE, OURS, "cpu_seconds"),
        "gemm_share": ratio(PRODUCTS, OURS),
        "reference_gemm_share": ratio(PRODUCTS, REFERENCE),
        "needed_gemm_share": median_with_interval(
            [
                row[PRODUCTS]["seconds"] / row[OURS]["seconds"] * row[PRODUCTS]["needed_flops"] / row[PRODUCTS]["flops"]
                for row in rows
            ]
        ),
    }
    peaks = {side: rows[-1][side]["peak_bytes"] for side in (OURS, REFERENCE)}
    return {
        **{name: interval["median"] for name, interval in intervals.items()},
        "memory_ratio": peaks[OURS] / peaks[REFERENCE],
        "intervals": intervals,
        "load_average": os.getloadavg()[0],
    }


def _describe(rows: list[Row], summary: dict[str, Any]) -> str:
    lines = [
        f"{summary['size']}, {summary['samples']} samples, equally many images, pairs and texts; "
        f"{summary['device']}, {summary['threads']} threads; {len(rows)} rounds in turn, median (95% interval); "
        f"torch {torch.__version__}",
        "",
        "| | step (s) | CPU time (s) | samples/s | share of the products' rate | peak memory (GiB) |",
        "|---|---|---|---|---|---|",
    ]
    shares = {OURS: "gemm_share", REFERENCE: "reference_gemm_share"}
    for side in (OURS, REFERENCE, PRODUCTS):
        seconds = median_with_interval([row[side]["seconds"] for row in rows])
        cpu_seconds = median_with_interval([row[side]["cpu_seconds"] for row in rows])["median"]
        cells = [side, _show(seconds), f"{cpu_seconds:.2f}"]
        if side == PRODUCTS:
            rate = median_with_interval([row[side]["flops"] / row[side]["seconds"] / 1e9 for row in rows])
            cells += ["", f"{_show(rate, 0)} GFLOP/s", ""]
        else:
            share, peak = summary["intervals"][shares[side]], rows[-1][side]["peak_bytes"] / 2**30
            cells += [f"{summary['samples'] / seconds['median']:.2f}", _show(share), f"{peak:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    names = ("ratio", "gemm_share", "needed_gemm_share")
    figures = ", ".join(f"{name} {_show(summary['intervals'][name])}" for name in names)
    return "\n".join([*lines, "", f"{figures}, memory_ratio {summary['memory_ratio']:.2f}"])


def _show(values: dict[str, float], digits: int = 2) -> str:
    return f"{values['median']:.{digits}f} ({values['low']:.{digits}f} to {values['high']:.{digits}f})"
