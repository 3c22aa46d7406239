"""Starts tiny training runs whose losses and gradient norms are recorded in `losses.json`.

`python -m tests.golden.runs` overwrites the file. Run it only after a change that is meant to change the values.
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
"""Largest relative difference from the recorded values on another processor or with other libraries."""

MEASURED = ("loss", "image_mim", "text_mlm", "pair_mim", "pair_mlm", "grad_norm", "learning_rate")
"""Keys of a record whose values do not depend on time."""

LAYOUTS: dict[str, tuple[int, int, dict[str, int]]] = {
    "one process": (1, 0, {}),
    "ZeRO-3 on 2 ranks": (2, 3, {}),
    "tensor 2 x pipeline 2": (4, 1, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
}
"""Number of ranks, ZeRO stage and keys of the section "parallel", by name."""

SIZES = {"image_size": 32, "visual_vocab_size": 32, "text_vocab_size": 130, "drop_path_rate": 0.2}
"""Sizes that all models share, in addition to those of `small_run_mapping`."""

NUM_STEPS = 5

Records = list[dict[str, Any]]


def run_layout(layout: str, folder: Path) -> dict[str, Records]:
    """Trains every model through the entry point; returns each model's records of steps and evaluations in order."""
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
    """Trains one run after another on one rank, each with a new port; returns the exit statuses."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"  # more threads add in another order; `run_ranks` started this one with one
    statuses = []
    for config in configs:
        os.environ["MASTER_PORT"] = _agree_on_port(Path(f"{config}.port"))  # the last run's may still be closing
        statuses.append(main([config]))
    return statuses


def _agree_on_port(path: Path) -> str:
    """Returns a port for all ranks.

    Rank 0 writes a free port to a file right before its use. The other ranks wait for the file.
    """
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            path.with_suffix(".draft").write_text(str(probe.getsockname()[1]))
        path.with_suffix(".draft").rename(path)
    while not path.exists():
        time.sleep(0.01)
    return path.read_text()


def read_records(path: Path) -> Records:
    """Returns losses and norms of steps and evaluations from a `metrics.jsonl`."""
    records = MetricsLog(path).records()
    return [
        {key: record[key] for key in ("step", "kind", *MEASURED) if key in record}
        for record in records
        if record["kind"] in ("train", "validation")
    ]


def find_moved(records: Records, expected: Records) -> list[str]:
    """Describes every value that differs from the recorded one.

    Values must be equal bit for bit on the machine of `losses.json`, and elsewhere up to `ROUNDING`.
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
    """Describes hardware and libraries that affect rounding and decoding.

    Equal descriptions mean that values are equal bit for bit.
    """
    import torch

    versions = {name: version(name) for name in ("torch", "torchvision", "pillow", "numpy", "sentencepiece")}
    return {**versions, "cpu": _processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}


def _processor() -> str:
    """Returns the name of the processor, by which libraries choose kernels for matrix products."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    """Trains all runs and writes `losses.json`."""
    lines = [f'"machine": {json.dumps(describe_machine())}']
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            runs = run_layout(layout, Path(folder))
        for model, records in runs.items():
            lines.append(f'"{layout}, {model}": [\n' + ",\n".join(map(json.dumps, records)) + "]")
    LOSSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
