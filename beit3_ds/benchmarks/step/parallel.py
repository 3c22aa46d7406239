"""Measures the cost of dividing a training step over two processes, compared with one process with two threads."""

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.config import RunConfig, build_run_config
from beit3_ds.data.images.augmentation import Views
from beit3_ds.tasks.pretraining.config import pretraining_config
from beit3_ds.tasks.pretraining.packing import ImageSample, PairSample, Sample, TextSample, image_shape, pack
from beit3_ds.tasks.pretraining.targets import with_visual_codes

_ROUNDS = 3
_STEPS = 4  # the first step has one-off work and does not count
_SAMPLES = 16  # images, and the same number of pairs and texts


class StepVariant(NamedTuple):
    """Describes one way to run the measured step: number of processes, threads per process, and ZeRO stage."""

    name: str
    """Name of the variant in the table."""
    ranks: int
    """Number of processes."""
    threads: int
    """Threads per process."""
    zero_stage: int
    """ZeRO stage: 1 divides the optimizer states over the ranks, 2 also the gradients, 3 also the parameters."""
    apart: bool = False
    """Whether each of two processes trains alone on half of the samples, without communication."""


VARIANTS = (
    StepVariant("one process, two threads", 1, 2, 0),
    StepVariant("two processes that send nothing", 2, 1, 0, apart=True),
    StepVariant("two ranks, ZeRO-0", 2, 1, 0),
    StepVariant("two ranks, ZeRO-1", 2, 1, 1),
    StepVariant("two ranks, ZeRO-3", 2, 1, 3),
)
"""Ways to run the step. The first variant is the baseline. Each later variant adds one cost to the variant before it,
in this order: separate processes, gradient reduction, divided updates, and divided gradients and parameters."""


def benchmark_parallel(json_path: str | None = None) -> str:
    """Measures one training step with one and with two processes (`VARIANTS`), in several rounds; returns a report.

    The five variants are one process, two processes without communication, and two processes with ZeRO stage 0, 1 or 3.
    In each round, all variants run in turn. The step has 16 images, 16 pairs and 16 texts. With two processes, each
    process computes half of these samples. The model has 6 blocks of width 384 and a vocabulary of 64k, in float32.
    Ratios are computed within a round: the time of one process with two threads, divided by the time of two processes
    with one thread each.

    Args:
        json_path: file for the results as JSON, with `rows` and `summary`. `summary.efficiency` is the median ratio
            under ZeRO-3.
    """
    rows = []
    for round_number in range(_ROUNDS):
        # The order alternates, so that no variant gains if the machine slows down.
        order = VARIANTS if round_number % 2 == 0 else VARIANTS[::-1]
        with tempfile.TemporaryDirectory() as folder:
            rows.append({variant.name: _measure(variant, folder) for variant in order})
        print(f"round {round_number + 1} of {_ROUNDS} done", file=sys.stderr, flush=True)
    ratios = {
        variant.name: sorted(row[VARIANTS[0].name]["step"] / row[variant.name]["step"] for row in rows)
        for variant in VARIANTS
    }
    efficiency = ratios[VARIANTS[-1].name]
    summary = {"efficiency": statistics.median(efficiency), "low": efficiency[0], "high": efficiency[-1]}
    if json_path:
        Path(json_path).write_text(json.dumps({"rows": rows, "summary": summary}, indent=2))
    return _describe(rows, ratios)


def _describe(rows: list[dict[str, dict[str, float]]], ratios: dict[str, list[float]]) -> str:
    lines = [
        "| variant | step (s) | forward and backward | update | throughput against the first (lowest to highest) |"
    ]
    lines.append("|---|---|---|---|---|")
    for variant in VARIANTS:
        step, passes, update = (
            statistics.median(row[variant.name][key] for row in rows) for key in ("step", "passes", "update")
        )
        ratio = ratios[variant.name]
        lines.append(
            f"| {variant.name} | {step:.2f} | {passes:.2f} | {update:.2f} | "
            f"{statistics.median(ratio):.2f} ({ratio[0]:.2f} to {ratio[-1]:.2f}) |"
        )
    return "\n".join(lines)


def _measure(variant: StepVariant, folder: str) -> dict[str, float]:
    """Runs the processes of a variant, and returns median seconds of a step, of its passes and of its update.

    If there are several processes, the figures are those of the slowest process.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(variant.ranks):
        environment = dict(os.environ, OMP_NUM_THREADS=str(variant.threads), MASTER_ADDR="127.0.0.1")
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": str(port + rank)}
        joined = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
        environment |= alone if variant.ranks == 1 or variant.apart else joined
        command = [
            sys.executable,
            "-m",
            "beit3_ds.benchmarks.step.parallel",
            str(variant.zero_stage),
            str(variant.ranks),
        ]
        command += [str(rank), folder]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    results = []
    for process in processes:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{variant.name}: a process failed:\n{errors.decode()[-2000:]}")
        results.append(json.loads(output.decode().splitlines()[-1]))
    return {key: max(result[key] for result in results) for key in results[0]}


def run_steps(zero_stage: int, shares: int, share: int, folder: str) -> dict[str, float]:
    """Runs the training steps of one process.

    Args:
        zero_stage: ZeRO stage of the engine.
        shares: number of processes among which the samples are divided.
        share: index of this process, from 0.
        folder: folder for a file with a secret. The processes use the secret to recognise each other when they connect.

    Returns:
        Median seconds of a whole step, of the forward and backward passes, and of the update.
    """
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import apply_update, build_schedule
    from beit3_ds.training.loss import build_loss_factors

    config = parallel_config(zero_stage)
    mesh = init_process_group(config.parallel, folder)
    task = build_task(config)
    schedule = build_schedule(task, mesh)
    batch = build_share(config, range(share * _SAMPLES // shares, (share + 1) * _SAMPLES // shares))
    counts = mesh.data_host.sum(torch.tensor(batch.term_counts))
    factors = build_loss_factors(counts, task.terms, mesh.data_parallel_size)
    seconds: dict[str, list[float]] = {"step": [], "passes": [], "update": []}
    for _ in range(_STEPS):
        mesh.barrier()
        start = time.perf_counter()
        schedule.accumulate_gradients([batch], factors, lambda prepared: prepared)
        middle = time.perf_counter()
        apply_update(schedule.engine, mesh)
        mesh.barrier()
        end = time.perf_counter()
        for name, value in (("step", end - start), ("passes", middle - start), ("update", end - middle)):
            seconds[name].append(value)
    mesh.close()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def parallel_config(zero_stage: int) -> RunConfig:
    """Returns the run config of the measured step."""
    stream = {"train": ["none.tar"], "samples_per_step": _SAMPLES}
    sizes = {"num_layers": 6, "hidden_size": 384, "ffn_hidden_size": 1536, "num_attention_heads": 6, "patch_size": 16}
    zero: dict[str, Any] = {"stage": zero_stage}
    if zero_stage == 3:
        # Biases and norms stay whole; buckets hold the largest table, so that it is reduced in one message.
        zero |= {"stage3_param_persistence_threshold": 20_000, "reduce_bucket_size": 50_000_000}
    return build_run_config(
        {
            "gradient_clipping": 3.0,
            "zero_optimization": zero,
            "steps_per_print": 1_000_000_000,
            "beit3_ds": {
                "model": sizes,
                "data": {"images": stream, "pairs": stream, "texts": stream},
                "tokenizers": {
                    "text": {"path": "none.spm", "vocab_size": 64000},
                    "visual": {"path": "none.safetensors", "image_size": 224, "patch_size": 16},
                },
                "training": {
                    "output_dir": "none",
                    "total_steps": 100,
                    "warmup_steps": 1,
                    "learning_rate": 1e-3,
                },
            },
        }
    )


def build_share(config: RunConfig, samples: Sequence[int]) -> PackedBatch:
    """Builds a batch of random images, pairs and texts, with the paper's mask ratios.

    Args:
        config: config of the run.
        samples: sample numbers. Each number gives one image, one pair and one text, which are the same in all
            processes.
    """
    model, data, ratios = config.model, config.data, pretraining_config(config)

    def image(rng: np.random.Generator) -> ImageSample:
        hidden = np.arange(model.num_patches) < round(model.num_patches * ratios.image_mask_ratio)
        view = torch.from_numpy(rng.uniform(-1, 1, (3, model.image_size, model.image_size))).float()
        return ImageSample(name="", views=Views(view, view), patch_mask=rng.permutation(hidden))

    def text(rng: np.random.Generator, longest: int, ratio: float) -> TextSample:
        ids = rng.integers(0, model.text_vocab_size, rng.integers(longest // 2, longest + 1))
        positions = np.flatnonzero(rng.random(len(ids)) < ratio)
        return TextSample(name="", ids=ids, masked_positions=positions, target_ids=ids[positions])

    packed: list[Sample] = [image(np.random.default_rng([0, i])) for i in samples]
    for i in samples:
        rng = np.random.default_rng([1, i])
        caption = text(rng, data.pair_text_length, ratios.pair_text_mask_ratio)
        packed.append(PairSample(image=image(rng), caption=caption))
    packed += [text(np.random.default_rng([2, i]), data.text_length, ratios.text_mask_ratio) for i in samples]
    batch = pack(packed, None, {}, image_shape(config))
    codes = torch.arange(batch.patch_mask.numel()).view(batch.patch_mask.shape) % model.visual_vocab_size
    return with_visual_codes(batch, codes)


if __name__ == "__main__":
    stage, number, index = map(int, sys.argv[1:4])
    print(json.dumps(run_steps(stage, number, index, sys.argv[4])))
