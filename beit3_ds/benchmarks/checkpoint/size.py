"""Chooses the model size for the checkpoint benchmark, by measuring the memory of smaller models."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from beit3_ds.benchmarks.checkpoint.processes import run_ranks
from beit3_ds.benchmarks.checkpoint.ranks import state_config
from beit3_ds.config import ConfigError
from beit3_ds.runtime.node_size import measure_node
from beit3_ds.tasks.pretraining.model import PretrainingModel

SIZES = ("tiny", "base", "large", "giant")
_MEASURED = ("tiny", "base")  # sizes that are run once to predict the memory of larger ones
_DISK_BYTES = 44
"""Bytes on disk per parameter: 12 for one DeepSpeed checkpoint, 24 for two checkpoints of this project, and 8 for two
exports."""
_LEAST_BYTES = 1_500_000_000  # assumed need of the smallest size per rank, because nothing is measured yet
_CACHE_BYTES = 2_000_000_000  # memory left for the page cache and other processes


class Choice(NamedTuple):
    """Holds the chosen model size, its number of parameters, and the reason for the choice."""

    size: str
    num_parameters: int
    reason: str


class Peak(NamedTuple):
    """Holds the number of parameters of a model, and the measured peak memory in bytes.

    The memory is the sum of the ranks' peaks. If the number of parameters is 0, the memory is the sum of the ranks'
    memory for libraries alone.
    """

    num_parameters: int
    num_bytes: int


def choose_size(size: str | None, ranks: int, folder: Path) -> Choice:
    """Returns the given model size, or the largest size that fits into memory and on the disk.

    To predict the memory of a size, the function measures smaller sizes (`_MEASURED`), and assumes that memory is
    linear in the number of parameters.

    Raises:
        ConfigError: if the given size is unknown or does not fit, or if no size fits.
    """
    free = _available_bytes(), shutil.disk_usage(folder).free
    reason = f"{free[0] / 2**30:.1f} GiB of memory and {free[1] / 2**30:.0f} GiB of disk are free"
    count_parameters(size or SIZES[0])  # checks the name before anything is measured
    peaks: list[Peak] = []
    choice: Choice | None = None
    for candidate in SIZES[: SIZES.index(size) + 1] if size else SIZES:
        count = count_parameters(candidate)
        needs = _CACHE_BYTES + (predict_bytes(peaks, count) if peaks else ranks * _LEAST_BYTES), count * _DISK_BYTES
        reason += f"; {candidate} needs {needs[0] / 2**30:.1f} GiB and {needs[1] / 2**30:.0f} GiB"
        if needs[0] > free[0] or needs[1] > free[1]:
            choice = None if size else choice
            break
        choice = Choice(candidate, count, reason)
        if candidate in _MEASURED and candidate != size:
            libraries, peak = _measure_peak(candidate, ranks, folder)
            peaks = [*peaks, Peak(count, peak)] if peaks else [Peak(0, libraries), Peak(count, peak)]
    if choice is None:
        raise ConfigError(f"bench checkpoint: {reason}. Name a smaller --size, fewer --ranks or another --folder.")
    return choice._replace(reason=reason)


def predict_bytes(peaks: Sequence[Peak], num_parameters: int) -> int:
    """Predicts a larger model's memory in bytes, by linear extrapolation from the two largest measured models."""
    (less, low), (more, high) = peaks[-2:]
    return high + (high - low) * (num_parameters - more) // (more - less)


def count_parameters(size: str) -> int:
    """Returns the number of parameters of the pretraining model of size `size`.

    The model's attention weights have the layout `shared` (`ModelConfig.layout`).
    """
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in PretrainingModel(state_config(size, 1).model).parameters())


def _available_bytes() -> int:
    """Returns the free memory of the machine in bytes, limited to the container's memory limit."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    limit = measure_node().memory
    return free if limit is None else min(free, limit)


def _measure_peak(size: str, ranks: int, folder: Path) -> tuple[int, int]:
    """Saves and loads a model once, and returns two sums over ranks in bytes.

    The first is the memory of the libraries alone. The second is the peak memory.
    """
    print(f"measuring the memory of {size}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".bench-checkpoint-") as scratch:
        results = [run_ranks(Path(scratch), operation, size, 1, ranks) for operation in ("save", "load")]
    libraries = max(sum(rank["library_bytes"] for rank in of_ranks) for of_ranks in results)
    peak = max(sum(max(rank["build_peak_bytes"], *_peaks(rank["rows"])) for rank in of_ranks) for of_ranks in results)
    return libraries, peak


def _peaks(rows: Sequence[dict[str, int]]) -> list[int]:
    return [row["peak_bytes"] for row in rows]
