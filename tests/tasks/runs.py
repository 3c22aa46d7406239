"""Short runs of tasks on drawn scenes, and what must be the same in every layout."""

import json
import os
from pathlib import Path
from typing import Any

from beit3_ds.training.metrics_log import MetricsLog
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping

LAYOUTS: dict[str, tuple[int, int, int, dict[str, Any]]] = {
    "ZeRO-3 on 2 ranks": (2, 3, 1, {}),
    "ZeRO-1 on 3 ranks": (3, 1, 1, {}),
    "ZeRO-2, 2 ranks, 2 micro-batches": (2, 2, 2, {}),
    "4 micro-batches": (1, 0, 4, {}),
    "tensor 2, sequence parallel": (2, 1, 2, {"tensor_parallel_size": 2, "sequence_parallel": True}),
    "pipeline 2": (2, 1, 2, {"pipeline_parallel_size": 2}),
}
"""Ranks, ZeRO stage, micro-batches and parallel section, by name."""


def write_config(
    folder: Path,
    task: dict[str, Any],
    pairs: dict[str, Any],
    text_tokenizer: str,
    layout: tuple[int, int, int, dict[str, Any]] = (1, 0, 1, {}),
    **training: Any,
) -> Path:
    """Writes the configuration of a four-step run of a tiny model on pairs below `folder`."""
    _, zero_stage, accumulation, parallel = layout
    mapping = small_run_mapping(zero_stage, accumulation=accumulation, image_size=32, drop_path_rate=0.2)
    own = mapping["beit3_ds"]
    own["model"] |= {"inputs": ["pairs"], "text_vocab_size": 310}
    own["task"], own["parallel"] = task, {**parallel, "timeout_seconds": 300}
    own["data"] = {"pairs": pairs, "num_workers": 0, "text_length": 16, "pair_text_length": 24}
    own["tokenizers"] = {"text": {"path": text_tokenizer, "vocab_size": 300}}
    own["training"] |= {"output_dir": str(folder / "run"), "total_steps": 4, "warmup_steps": 1, "learning_rate": 3e-3}
    own["training"] |= {"log_interval": 1, "eval_interval": 2, "eval_samples": None, "eval_batch_size": 3}
    own["training"] |= {"save_interval": 2, **training}
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    return path


def train(config: str) -> int:
    """Runs the trainer on one rank and returns its exit status."""
    from beit3_ds.train import main

    os.environ["OMP_NUM_THREADS"] = "1"
    return main([config])


def train_on_ranks(config: Path, num_ranks: int = 1) -> None:
    """Runs the trainer and checks that all ranks succeed."""
    assert run_ranks(train, num_ranks, str(config)) == [0] * num_ranks


def figures(folder: Path, *names: str) -> list[dict[str, float]]:
    """Returns these figures of the training and validation records of the run below `folder`."""
    records = MetricsLog(folder / "run" / "metrics.jsonl").records()
    kept = [record for record in records if record["kind"] in ("train", "validation")]
    return [{name: record[name] for name in (*names, "loss", "grad_norm") if name in record} for record in kept]
