"""Prints the metrics of an evaluation and writes them as JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write
from beit3_ds.config import ConfigError
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.storage_error import StorageError

METRICS_FILE = "metrics.json"
"""Name of the metrics file in the results folder."""


def write_metrics(content: Mapping[str, Any], folder: ResultFolder) -> None:
    """Prints the metrics, writes them to `METRICS_FILE`, and tries again to write missing result files.

    Args:
        content: members of the JSON object (`format_metrics`).
        folder: folder of the results.

    Raises:
        ConfigError: if the folder cannot be written.
        StorageError: if a result file is still missing; the metrics file is written before the error.
    """
    print(format_metrics(content), flush=True)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder.path / METRICS_FILE) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())
    except OSError as error:
        raise unwritable(folder.path, error) from error
    folder.retry()
    if missing := ", ".join(map(str, folder.missing)):
        raise StorageError(f"not written: {missing}. Make room, or name another folder with --out, and evaluate again.")
    print(f"results: {folder.path}", flush=True)


def unwritable(folder: Path, error: OSError) -> ConfigError:
    """Builds the error for a results folder that cannot be written."""
    return ConfigError(f"{folder} cannot be written: {error}. Name another folder with --out.")


def format_metrics(content: Mapping[str, Any]) -> str:
    """Returns the metrics of an evaluation as a table.

    Args:
        content: metrics and their origin. The keys are `task`, `split` and `metrics`. For an evaluation of weights,
            further keys are `weights` and `step`. For scored result files, a further key is `results`, the paths of the
            files.
    """
    metrics = content["metrics"]
    if "results" in content:
        origin = f"results {', '.join(content['results'])}"
    else:
        origin = f"weights {content['weights']} (step {content['step']})"
    title = f"{content['task']} on {content['split']}, {origin}"
    if not metrics:
        return f"{title}: the split has no annotations, so nothing is scored"
    wide = max(map(len, metrics))
    return "\n".join([f"{title}:", *(f"  {name:<{wide}}  {value:.4f}" for name, value in metrics.items())])
