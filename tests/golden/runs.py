"""Starts tiny training runs whose losses and gradient norms are recorded in `losses.json`.

`python -m tests.golden.runs` overwrites the file. Run it only for a change that is meant to move numbers.
"""

import itertools
import json
import math
import os
import platform
import socket
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beit3_ds.training.metrics_log import MetricsLog
from tests.fixtures.tokenizers import copy_tokenizers
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping
from tests.training.steps import MODELS

LOSSES = Path(__file__).parent / "losses.json"
ROUNDING = 1e-5
"""Largest relative difference on another processor, or with other libraries, than the recorded ones."""

MEASURED = ("loss", "image_mim", "text_mlm", "pair_mim", "pair_mlm", "grad_norm", "learning_rate")
"""Keys of a record whose values do not depend on a clock."""

LAYOUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "one process": (1, 0, {}),
    "ZeRO-3 on 2 ranks": (2, 3, {}),
    "tensor 2 x pipeline 2": (4, 1, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}
"""Ranks, ZeRO stage and `parallel` section by name."""

SIZES = {"image_size": 32, "visual_vocab_size": 32, "text_vocab_size": 130, "drop_path_rate": 0.2}
"""Sizes that all models share, in addition to the ones in `small_run_mapping`."""

NUM_STEPS = 5

Records = list[dict[str, Any]]


def run_layout(layout: str, folder: Path) -> dict[str, Records]:
    """Trains every model through the entry point; returns each one's records of steps and evaluations, in order."""
    num_ranks, zero_stage, parallel = LAYOUTS[layout]
    configs = {model: _write_config(model, zero_stage, parallel, folder) for model in MODELS}
    statuses = run_ranks(_train, num_ranks, [str(config) for config in configs.values()])
    assert statuses == [[0] * len(configs)] * num_ranks
    return {model: read_records(config.parent / "run" / "metrics.jsonl") for model, config in configs.items()}


def _write_config(model: str, zero_stage: int, parallel: dict[str, int], folder: Path) -> Path:
    folder /= model
    folder.mkdir()
    paths = copy_tokenizers(folder)
    mapping = small_run_mapping(zero_stage, accumulation=2, **SIZES, **MODELS[model])
    mapping["gradient_clipping"] = 1.0  # below the gradient norm
    own = mapping["beit3_ds"]
    own["parallel"] = {**parallel, "timeout_seconds": 300}
    own["tokenizers"]["text"] |= {"path": paths["text"], "vocab_size": 120}
    own["tokenizers"]["visual"] |= {"path": paths["visual"], "image_size": 32, "codebook_size": 32}
    own["training"] |= {
        "output_dir": str(folder / "run"),
        "total_steps": NUM_STEPS,
        "warmup_steps": 1,
        "learning_rate": 3e-3,
        "log_interval": 1,
        "eval_interval": NUM_STEPS,
        "eval_samples": 8,
        "save_interval": NUM_STEPS,
    }
    config = folder / "config.json"
    config.write_text(json.dumps(mapping))
    return config


def _train(configs: list[str]) -> list[int]:
    """On one rank: trains one run after the other, each with a port of its own, and returns the exit statuses."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"  # more threads add in another order; `run_ranks` started this one with one
    statuses = []
    for config in configs:
        os.environ["MASTER_PORT"] = _agree_on_port(Path(f"{config}.port"))  # the last run's may still be closing
        statuses.append(main([config]))
    return statuses


def _agree_on_port(path: Path) -> str:
    """Rank 0 writes a free port to a file right before its use; the others wait for the file."""
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            path.with_suffix(".draft").write_text(str(probe.getsockname()[1]))
        path.with_suffix(".draft").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def read_records(path: Path) -> Records:
    """Returns the losses and norms of steps and evaluations in a `metrics.jsonl`."""
    records = MetricsLog(path).records()
    return [
        {key: record[key] for key in ("step", "kind", *MEASURED) if key in record}
        for record in records
        if record["kind"] in ("train", "validation")
    ]


def find_moved(records: Records, expected: Records) -> list[str]:
    """Describes every value that is not the recorded one: bit for bit on the machine of `losses.json`.

    On another machine or with other libraries values may differ by `ROUNDING`.
    """
    tolerance = 0.0 if json.loads(LOSSES.read_text())["machine"] == describe_machine() else ROUNDING
    return [
        f"step {before['step']} ({before['kind']}): {key} is {now.get(key)!r}, was {before.get(key)!r}"
        for now, before in itertools.zip_longest(records, expected, fillvalue={"step": None, "kind": None})
        for key in dict.fromkeys([*now, *before])
        if not _is_same(now.get(key), before.get(key), tolerance)
    ]


def _is_same(value: Any, expected: Any, tolerance: float) -> bool:
    if tolerance and isinstance(value, float) and isinstance(expected, float):
        return math.isclose(value, expected, rel_tol=tolerance)
    return bool(value == expected)


def describe_machine() -> dict[str, str]:
    """Describes hardware and libraries that affect rounding and decoding; equal descriptions mean equal bits."""
    import torch

    versions = {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy", "sentencepiece")}
    return {**versions, "cpu": _processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _processor() -> str:
    """Returns the name of the processor, for the libraries of matrix products choose kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Runs all and writes `losses.json`."""
    lines = [f'"machine": {json.dumps(describe_machine())}']
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            runs = run_layout(layout, Path(folder))
        for model, records in runs.items():
            lines.append(f'"{layout}, {model}": [\n' + ",\n".join(map(json.dumps, records)) + "]")
    LOSSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
