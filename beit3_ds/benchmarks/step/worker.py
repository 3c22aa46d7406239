"""Runs one process of `beit3 bench train`. For each request, it trains a step or computes a step's matrix products."""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TextIO

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.benchmarks.step.batches import build_batch, describe_batch, step_config
from beit3_ds.benchmarks.step.benchmark import OURS, PRODUCTS, REFERENCE, REFERENCE_TO_LONGEST
from beit3_ds.benchmarks.step.products import Products, needed_flops
from beit3_ds.benchmarks.step.reference import ReferenceTrainer, unpack_streams
from beit3_ds.benchmarks.turns import Turn, device_of_turns, serve_turns
from beit3_ds.config import RunConfig


def train_ours(config: RunConfig) -> Callable[[PackedBatch], Turn]:
    """Returns a function that prepares a batch and returns a `Turn`.

    The timed function of the `Turn` trains this project's model for one step with DeepSpeed. The learning rate is
    constant. Batches must contain the target codes of patches.
    """
    # Imported here, so that DeepSpeed takes memory only in the process that measures this project.
    from beit3_ds.runtime.process_group import compute_device, init_process_group
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import apply_update, build_schedule
    from beit3_ds.training.loss import build_loss_factors

    mesh = init_process_group(config.parallel, config.training.output_dir)
    task = build_task(config)
    schedule, device = build_schedule(task, mesh), compute_device()

    def prepare(batch: PackedBatch) -> Turn:
        on_device = batch.to(device)
        counts = torch.tensor(batch.term_counts)
        factors = build_loss_factors(counts, task.terms, mesh.data_parallel_size).to(device)

        def step() -> float:
            sums = schedule.accumulate_gradients([on_device], factors, lambda prepared: prepared)
            apply_update(schedule.engine, mesh)
            return float(sums @ factors)

        return step, {"masked": [sum(batch.term_counts[::2]), sum(batch.term_counts[1::2])]}

    return prepare


def train_reference(config: RunConfig, pads_to_longest: bool) -> Callable[[PackedBatch], Turn]:
    """Returns a function that prepares a batch and returns a `Turn`.

    The timed function of the `Turn` trains the reference model for one step.

    Args:
        config: configuration of the run.
        pads_to_longest: whether texts are padded to the longest text of the batch. If False, they are padded to the
            maximum lengths in `config.data`.
    """
    lengths = (None, None) if pads_to_longest else (config.data.pair_text_length, config.data.text_length)
    device = device_of_turns()
    torch.manual_seed(config.training.seed)
    trainer = ReferenceTrainer(config, device)

    def prepare(batch: PackedBatch) -> Turn:
        streams = unpack_streams(batch.to(device), *lengths)
        patches, tokens = zip(*(stream.num_masked for stream in streams), strict=True)
        return lambda: trainer.step(streams), {"masked": [sum(patches), sum(tokens)]}

    return prepare


def multiply(config: RunConfig) -> Callable[[PackedBatch], Turn]:
    """Returns a function that makes a `Turn` of a batch.

    The function in the `Turn`, which the benchmark times, computes only the matrix products of one training step.
    """
    dtype = torch.bfloat16 if device_of_turns().type == "cuda" else torch.float32

    def prepare(batch: PackedBatch) -> Turn:
        products = Products(config.model, batch, dtype, device_of_turns())

        def step() -> float:
            products.run()
            return 0.0

        needed = needed_flops(config.model, batch)
        return step, {"flops": products.flops, "needed_flops": needed, "batch": describe_batch(batch)}

    return prepare


SIDES: dict[str, Callable[[RunConfig], Callable[[PackedBatch], Turn]]] = {
    OURS: train_ours,
    REFERENCE: partial(train_reference, pads_to_longest=False),
    REFERENCE_TO_LONGEST: partial(train_reference, pads_to_longest=True),
    PRODUCTS: multiply,
}


def serve(side: str, size: str, samples: int, orders: TextIO, answers: TextIO) -> None:
    """Measures one implementation for each batch number in `orders`, and writes the figures to `answers`
    (`serve_turns`).

    Args:
        side: name of the implementation to measure, a key of `SIDES`.
        size: model size.
        samples: number of images per step, equal to the number of pairs and to the number of texts.
        orders: lines with one batch number each.
        answers: open text file for the figures, one line of JSON per batch.
    """
    config = step_config(size, samples)
    if device_of_turns().type == "cuda":
        config = replace(config, deepspeed={**config.deepspeed, "bf16": {"enabled": True}})
    prepare = SIDES[side](config)
    serve_turns(lambda number: prepare(build_batch(config, number)), orders, answers)


if __name__ == "__main__":
    _, side, size, samples, descriptor = sys.argv
    serve(side, size, int(samples), sys.stdin, os.fdopen(int(descriptor), "w"))
