"""Runs one rank of the checkpoint benchmark, and measures either saving or loading.

In each round, this project and DeepSpeed are measured one after the other.
"""

import ctypes
import dataclasses
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beit3_ds.benchmarks.peak_memory import peak_bytes, reset_peak
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.index import KINDS
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.config import RunConfig, build_run_config
from beit3_ds.config.model import MODEL_SIZES
from beit3_ds.parallel import Mesh
from beit3_ds.tasks.pretraining.model import PretrainingModel

OURS, THEIRS = "beit3_ds", "deepspeed"
_TAG = "state"


def state_config(size: str, seed: int) -> RunConfig:
    """Returns the config of a bfloat16 run under ZeRO-3 with float32 master weights.

    Checkpoints of such runs are the usual input of `zero_to_fp32`.
    """
    stream = {"train": ["none.tar"], "samples_per_step": 64}
    grid = 224 // MODEL_SIZES.get(size, {}).get("patch_size", 16)  # an unknown size is refused below
    return build_run_config(
        {
            "bf16": {"enabled": True},
            "zero_optimization": {"stage": 3, "reduce_bucket_size": 50_000_000},
            "steps_per_print": 1_000_000_000,
            "beit3_ds": {
                "model": {"size": size},
                "data": {"images": stream, "pairs": stream, "texts": stream},
                "tokenizers": {
                    "text": {"path": "none.spm", "vocab_size": 64000},
                    "visual": {"path": "none.safetensors", "image_size": 16 * grid, "patch_size": 16},
                },
                "training": {
                    "output_dir": "none",
                    "total_steps": 100,
                    "warmup_steps": 1,
                    "learning_rate": 1e-3,
                    "seed": seed,
                },
            },
        }
    )


class _Rank:
    """Holds an engine with random weights and nonzero moments, as if some updates had been made."""

    def __init__(self, folder: Path, size: str, seed: int) -> None:
        from beit3_ds.runtime.process_group import init_process_group
        from beit3_ds.training.engine import build_engine

        config = state_config(size, seed)
        self.mesh: Mesh = init_process_group(config.parallel, str(folder))
        generator = torch.Generator().manual_seed(seed)
        model = PretrainingModel(config.model)
        for parameter in model.parameters():  # faster than the initial values of a run, which take minutes
            parameter.data.uniform_(-0.05, 0.05, generator=generator)
        self.engine = build_engine(config, model, self.mesh)
        del model, parameter
        self.state = EngineState(self.engine, self.mesh)
        for values in self._moments():  # zeros that were never written take no memory
            values.uniform_(0, 1, generator=generator)
        fields, layout = dataclasses.asdict(config.model), self.mesh.describe_layout()
        run = RunDescription(model=fields, config={}, tokenizers={}, layout=layout, versions={})
        self.store = CheckpointStore(folder / OURS, 1, self.mesh, run, config.parallel.timeout_seconds)
        self.theirs = folder / THEIRS
        self.rows: list[dict[str, Any]] = []
        self.state_bytes = self._count_state_bytes()

    def fingerprint(self) -> dict[str, float]:
        """Returns the sum of this rank's master weights, and the sum of each optimizer moment, by name."""
        sums = dict.fromkeys(KINDS, 0.0)
        for fragment in self.state.fragments_to_save():
            for kind in KINDS:
                sums[kind] += float(fragment.values(kind).sum(dtype=torch.float64))
        return sums

    @contextmanager
    def row(self, operation: str, by: str) -> Iterator[dict[str, Any]]:
        """Measures time and memory of a `with` block, and yields the row of results.

        The block may add values to the row.
        """
        self.mesh.barrier()
        if self.mesh.is_main:
            os.sync()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # freed memory of earlier work, such as the engine's build, must not count
        self.mesh.barrier()
        reset_peak()
        row: dict[str, Any] = {"operation": operation, "by": by}
        start = time.perf_counter()
        yield row
        self.mesh.barrier()
        row.setdefault("seconds", time.perf_counter() - start)
        row["peak_bytes"] = peak_bytes()
        self.rows.append(row)

    def _count_state_bytes(self) -> int:
        """Returns the bytes of this rank's shares of parameters, float32 master weights and moments, added up."""
        tensors = [parameter.ds_tensor for parameter in self.engine.module.parameters()]
        for fragment in self.state.fragments_to_save():
            tensors += [fragment.values(kind) for kind in KINDS]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def _moments(self) -> Iterator[Tensor]:
        for fragment in self.state.fragments_to_save():
            yield from fragment.optimizer_state.values()


def save(rank: _Rank, rounds: int) -> None:
    """Saves several times, in each round first with DeepSpeed and then with this project.

    This order keeps this project's copy of the state out of the memory that is measured for DeepSpeed's first save.
    """
    for number in range(rounds):
        with rank.row("save", THEIRS) as row:
            start = time.perf_counter()
            rank.engine.save_checkpoint(str(rank.theirs), tag=_TAG)
            rank.mesh.barrier()
            row["seconds"] = time.perf_counter() - start
            if rank.mesh.is_main:
                os.sync()
            rank.mesh.barrier()
            row["synced_seconds"] = time.perf_counter() - start
        if number == 0:
            rank.store.reserve_memory(rank.state)  # as a run does before its first step
            rank.store.finish()
        with rank.row("save", OURS) as row:
            rank.store.save(rank.state, number)
            rank.store.finish()
        (outcome,) = rank.store.take_outcomes()
        assert outcome.error is None, outcome.error
        row |= {"seconds": outcome.seconds, "synced_seconds": outcome.seconds}
        row |= {"held_up_seconds": outcome.held_up_seconds, "is_first": number == 0}


def load(rank: _Rank, rounds: int) -> None:
    """Loads several times, in each round first with this project and then with DeepSpeed.

    The files are removed from the page cache before each load.
    """
    for _ in range(rounds):
        for by, work in ((OURS, _load_ours), (THEIRS, _load_theirs)):
            if rank.mesh.is_main:
                drop_from_cache(rank.theirs if by == THEIRS else rank.store.root)
            with rank.row("load", by) as row:
                row |= work(rank)
            row["fingerprint"] = rank.fingerprint()


def _load_ours(rank: _Rank) -> Mapping[str, float]:
    start = time.perf_counter()
    newest = rank.store.agree_on_newest()
    assert newest is not None
    checked = time.perf_counter() - start
    rank.store.load(rank.state, newest)
    return {"check_seconds": checked}


def _load_theirs(rank: _Rank) -> Mapping[str, float]:
    path, _ = rank.engine.load_checkpoint(str(rank.theirs), tag=_TAG)
    assert path is not None
    return {}


def drop_from_cache(folder: Path) -> None:
    """Removes all files below a folder from the page cache."""
    os.sync()  # only clean pages can be dropped
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def main(operation: str, folder: str, size: str, rounds: str, result: str) -> None:
    """Runs one rank, and writes the results and the fingerprint of the state to a file."""
    operations: dict[str, tuple[Callable[[_Rank, int], None], int]] = {"save": (save, 1), "load": (load, 2)}
    work, seed = operations[operation]
    start, library_bytes = time.perf_counter(), peak_bytes()
    rank = _Rank(Path(folder), size, seed)
    before = {
        "build_seconds": time.perf_counter() - start,
        "fingerprint": rank.fingerprint(),
        "library_bytes": library_bytes,
        "build_peak_bytes": peak_bytes(),
        "state_bytes": rank.state_bytes,
    }
    work(rank, int(rounds))
    Path(result).write_text(json.dumps({**before, "rows": rank.rows}))
    rank.mesh.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
