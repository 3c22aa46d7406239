"""Compiles the Triton kernels of a run into Triton's cache, on a machine without a GPU.

A small copy of the run's model, with one layer of each kind, launches all kernels of a training step and of a
prediction. A fake GPU driver compiles each launched kernel without running it (`fake_driver`). A few rows suffice,
because kernels do not depend on the number of rows. A run can use the cache if its GPUs have the architecture for which
the kernels were compiled. The run must also use the versions of Triton and of this package that filled the cache.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ConfigError, ParallelConfig, RunConfig
from beit3_ds.data.packing import pack_inputs
from beit3_ds.kernels.triton.compilations import Compilations
from beit3_ds.model import TaskModel
from beit3_ds.parallel import TensorParallel, VocabParallelHead
from beit3_ds.tasks import Task, build_task

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_HEAD_ROWS, _TEXT_LENGTH = 5, 7


class FilledCache(NamedTuple):
    """Describes Triton's cache after the kernels of a run were compiled into it."""

    num_kernels: int
    """Number of kernels that the run launches."""
    num_compiled: int
    """Number of the run's kernels that had to be compiled, because the cache lacked them."""
    seconds: float
    """Duration of the compilation in seconds."""
    num_bytes: int
    """Size of the whole cache in bytes, including kernels of other runs."""
    folder: Path
    """Folder of the cache."""


def fill_cache(
    config: RunConfig, architecture: int, folder: Path | None, report: Callable[[str, float], None]
) -> FilledCache:
    """Compiles all kernels that a run launches, in all tile sizes that autotuning tries, and stores them in Triton's
    cache.

    Args:
        config: the run's configuration.
        architecture: GPU architecture: 80, 90 or 100.
        folder: folder of the cache; None uses Triton's own (`TRITON_CACHE_DIR`).
        report: function called after each compilation with the kernel's name and the seconds that it took.

    Raises:
        ConfigError: if Triton is not installed, the folder cannot be written, or the run uses no Triton kernels.
    """
    try:
        import triton

        from beit3_ds.kernels.triton.fake_driver import fake_gpu
    except ModuleNotFoundError:
        raise ConfigError("compile-kernels: Triton is not installed; it comes with torch's builds for GPUs.") from None
    if config.training.kernel_backend == "library":
        raise ConfigError("compile-kernels: training.kernel_backend='library' runs no kernels of this project.")
    task = build_task(config)
    if not task.has_backbone:
        raise ConfigError(f"compile-kernels: the task {config.task.name} runs no kernels of this project.")
    with triton.knobs.cache.scope():
        if folder is not None:
            triton.knobs.cache.dir = str(folder.resolve())
        cache = Path(triton.knobs.cache.dir)
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"compile-kernels: the cache {cache} cannot be written: {error.strerror}.") from None
        compilations, start = Compilations(report), time.monotonic()
        compilations.start()
        with fake_gpu(architecture, compiles=True) as gpu:
            launch_kernels(config)
        num_bytes = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return FilledCache(len(gpu.kernels), compilations.num_misses, time.monotonic() - start, num_bytes, cache)


def launch_kernels(config: RunConfig) -> None:
    """Trains and predicts on a small batch, so that each kernel of the run is launched. The computed values have no
    meaning.
    """
    shared = config.model.num_vision_language_layers
    model_config = replace(config.model, num_layers=2, num_vision_language_layers=min(1, shared))
    task = build_task(replace(config, backbone=model_config))
    with _tensor_parallel(config.parallel) as tensor:
        model = task.build_model(tensor, None)
        assert isinstance(model, TaskModel)
        model.to(_DTYPES[config.options.precision])
        batch = _build_batch(task)
        _train(model, batch)
        with torch.no_grad():
            model.run_layers(replace(batch, drop_path=None))


def _train(model: TaskModel, batch: PackedBatch) -> None:
    h_TD = model.run_layers(batch)
    total = h_TD.float().sum()
    target_M = torch.zeros(_HEAD_ROWS, dtype=torch.int64)
    for module in model.modules():
        if isinstance(module, VocabParallelHead):
            total = total + module(h_TD[:_HEAD_ROWS], target_M).loss.sum()
    total.backward()


def _build_batch(task: Task) -> PackedBatch:
    """Returns a batch with one input of each kind that the task uses.

    The batch has stochastic-depth factors if the run uses stochastic depth.
    """
    model = task.config.model
    num_images, num_pairs, num_texts = (int(kind in task.inputs) for kind in ("images", "pairs", "texts"))
    text, num_pixels = np.full(_TEXT_LENGTH, 3), num_images + num_pairs
    factors = torch.ones(num_pixels + num_texts, model.num_layers, 2)
    batch = pack_inputs(
        num_images=num_images,
        pixels=torch.zeros(num_pixels, 3, model.image_size, model.image_size) if num_pixels else None,
        num_patches=model.num_patches,
        captions=[text] * num_pairs,
        texts=[text] * num_texts,
        drop_path=factors if model.drop_path_rate else None,
    )
    return replace(batch, causal_captions=task.causal_captions)


@contextmanager
def _tensor_parallel(parallel: ParallelConfig) -> Iterator[TensorParallel]:
    """Yields a group of `parallel.tensor_parallel_size` ranks without communication: the results of its collectives are
    undefined.
    """
    size = parallel.tensor_parallel_size
    if size == 1:
        yield TensorParallel()
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    store: Any = FakeStore()
    dist.init_process_group("fake", store=store, rank=0, world_size=size)
    try:
        group = dist.group.WORLD
        yield TensorParallel(group=group, rank=0, size=size, sequence_parallel=parallel.sequence_parallel)
    finally:
        dist.destroy_process_group()
