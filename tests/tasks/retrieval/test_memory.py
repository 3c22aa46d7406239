"""Tests that the memory of a step is that of one micro-batch, even if the step compares many pairs."""

import ctypes
import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig, build_run_config
from tests.ranks import run_ranks
from tests.run_config import small_run_mapping

MICRO_BATCH, SIZE, HIDDEN = 64, 64, 128
MIB = 2**20


def build_config(num_pairs: int) -> RunConfig:
    sizes = {"num_layers": 6, "hidden_size": HIDDEN, "ffn_hidden_size": 4 * HIDDEN, "num_attention_heads": 4}
    inputs = {"inputs": ["images", "texts"], "image_size": SIZE, "patch_size": 8, "drop_path_rate": 0.0}
    mapping = small_run_mapping(0, (0, num_pairs, 0), num_pairs // MICRO_BATCH, **sizes, **inputs)
    mapping["beit3_ds"]["task"] = {"name": "retrieval"}
    data = mapping["beit3_ds"]["data"]
    mapping["beit3_ds"]["data"] = {"pairs": {**data["pairs"], "samples_per_step": num_pairs}, "text_length": 64}
    return build_run_config(mapping)


def build_batches(config: RunConfig, num_pairs: int) -> list[PackedBatch]:
    """Returns micro-batches without pixels; `prepare` adds the pixels on the device, one micro-batch at a time."""
    from beit3_ds.tasks.retrieval.packing import pack
    from beit3_ds.tasks.retrieval.samples import RetrievalSample

    rng = np.random.default_rng(0)
    samples = [
        RetrievalSample(
            name=str(number),
            sample_index=number,
            view=torch.empty(0),
            texts=(rng.integers(0, 1000, 16),),
            image_id=number,
            text_ids=(number,),
        )
        for number in range(num_pairs)
    ]
    parts = [samples[start : start + MICRO_BATCH] for start in range(0, num_pairs, MICRO_BATCH)]
    return [pack(part, None, {}, config.model, embeds=False) for part in parts]


def prepare(batch: PackedBatch) -> PackedBatch:
    generator = torch.Generator().manual_seed(int(batch.targets["image_id"][0]))
    return dataclasses.replace(batch, pixels=torch.randn(batch.num_images, 3, SIZE, SIZE, generator=generator))


def measure_step(num_pairs: int) -> tuple[int, float]:
    """Runs a step; returns the peak memory above the memory before it, in bytes, and the loss."""
    from beit3_ds.parallel import Mesh
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_schedule
    from beit3_ds.training.loss import build_loss_factors

    _return_freed_memory()
    config = build_config(num_pairs)
    mesh: Mesh = init_process_group(config.parallel)
    task = build_task(config)
    schedule = build_schedule(task, mesh)
    batches = build_batches(config, num_pairs)
    factors = build_loss_factors(torch.tensor([num_pairs] * 4), task.terms, 1)
    step = functools.partial(schedule.accumulate_gradients, batches, factors, prepare)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present size
    before = _memory("VmHWM")
    sums = step()
    return _memory("VmHWM") - before, float((sums * factors).sum())


def _return_freed_memory() -> None:
    """Makes freed tensors leave the process, so that the size of the process is that of the tensors in use.

    Trainers keep freed memory, and glibc 2.36 reuses little memory of `posix_memalign`.
    """
    from beit3_ds.kernels.cpu.allocator import Allocator

    Allocator.keep_freed_memory = lambda self, device, lasting=0: None  # type: ignore[method-assign]
    mmap_threshold = -3  # of glibc's malloc.h
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16) == 1


def _memory(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_memory_is_that_of_a_micro_batch() -> None:
    """Checks that 1,024 pairs take at most 1.15 times the memory of 64 pairs, plus the features.

    Each number of pairs runs in its own process.
    """
    (few, few_loss), (many, many_loss) = (run_ranks(measure_step, 1, count)[0] for count in (MICRO_BATCH, 1024))
    features = 2 * 1024 * HIDDEN * 4
    print(f"peak above start: 64 pairs {few / MIB:.1f} MiB, 1,024 pairs {many / MIB:.1f} MiB, loss {many_loss:.3f}")
    assert few > 20 * features, "too small a model to tell"
    assert many <= 1.15 * few + features
    assert many_loss > few_loss + 1  # more negatives
