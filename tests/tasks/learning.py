"""Trains small models on drawn scenes, for tests of learning."""

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beit3_ds.config import TextTokenizerConfig
from beit3_ds.tokenizers.text import train_text_tokenizer
from beit3_ds.training.metrics_log import MetricsLog
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping
from tests.tasks.fine_tuning import evaluate, train, write_json

SEEDS = (1, 2, 3)
T_95_TWO_DEGREES = 4.303  # Student's t for a two-sided 95% interval over three seeds
_TIMEOUT_SECONDS = 3600


def train_words(texts: Sequence[str], path: Path, vocab_size: int) -> dict[str, Any]:
    """Trains a text tokenizer with one piece per word; returns the tokenizer's section of a configuration."""
    section = {"path": str(path), "vocab_size": vocab_size, "character_coverage": 1.0}
    train_text_tokenizer(TextTokenizerConfig(**section), list(texts))
    return {"text": section}


def learning_mapping(
    folder: Path, task: dict[str, Any], pairs: dict[str, Any], tokenizers: dict[str, Any], seed: int, steps: int
) -> dict[str, Any]:
    """Returns a run without augmentation: two layers of width 128, and 32-pixel images of four patches."""
    mapping = small_run_mapping(0, image_size=32, patch_size=16, hidden_size=128, ffn_hidden_size=512)
    own = mapping["beit3_ds"]
    own["model"] |= {"num_attention_heads": 4, "inputs": ["pairs"], "drop_path_rate": 0.0, "max_text_length": 32}
    own["model"]["text_vocab_size"] = tokenizers["text"]["vocab_size"] + 4
    own["task"], own["tokenizers"] = task, tokenizers
    own["data"] = {"pairs": pairs, "num_workers": 0, "text_length": 32, "pair_text_length": 32}
    own["data"] |= {"min_crop_scale": 1.0, "color_jitter": 0.0, "pair_flip_probability": 0.0}
    own["training"] = {"output_dir": str(folder / "run"), "total_steps": steps, "warmup_steps": steps // 10}
    own["training"] |= {"learning_rate": 2e-3, "seed": seed, "log_interval": 50, "eval_interval": steps}
    own["training"] |= {"save_interval": steps, "eval_batch_size": 50}
    return mapping


def cpu_seconds_of_training(config: str) -> float:
    """Trains on one rank; returns the rank's CPU time in seconds, of all threads, with evaluations and files."""
    assert train(config) == 0
    return time.process_time()


def train_mapping(folder: Path, mapping: dict[str, Any]) -> dict[str, float]:
    """Trains a configuration on one rank; returns the last metrics, and prints the CPU time."""
    config = write_json(folder, mapping)
    [seconds] = run_ranks(cpu_seconds_of_training, 1, str(config), timeout=_TIMEOUT_SECONDS)
    print(f"{folder.name}: {seconds:.0f} CPU seconds")
    records = MetricsLog(folder / "run" / "metrics.jsonl").records()
    return [record for record in records if record["kind"] == "validation"][-1]


def evaluate_weights(folder: Path, mapping: dict[str, Any], weights: Path, *, num_ranks: int = 1) -> dict[str, float]:
    """Evaluates weights on the validation split of a configuration; returns the metrics."""
    config, out = write_json(folder, mapping), folder / "out"
    arguments = [str(config), "--weights", str(weights), "--out", str(out)]
    assert run_ranks(evaluate, num_ranks, arguments, timeout=_TIMEOUT_SECONDS) == [0] * num_ranks
    metrics: dict[str, float] = json.loads((out / "metrics.json").read_text())["metrics"]
    return metrics


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% confidence interval of a mean over three seeds (Student's t)."""
    assert len(differences) == len(SEEDS)
    half = T_95_TWO_DEGREES * statistics.stdev(differences) / len(differences) ** 0.5
    mean = statistics.mean(differences)
    return mean - half, mean + half
