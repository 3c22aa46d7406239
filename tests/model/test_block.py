"""Tests which rows a block computes; test_beit3.py shows that results do not depend on this choice."""

import dataclasses

import pytest
import torch

from beit3_ds.model import initialize_parameters
from beit3_ds.model.block import computed_sequences
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


def rows_seen(batch: object, layers: range | None = None) -> dict[str, int]:
    """Returns the number of rows passed to attention and FFN of every block."""
    model, seen = PretrainingModel(CONFIG), {}
    initialize_parameters(model, CONFIG, seed=3)
    for name, block in model.blocks.items():
        for part in ("attention", "ffn"):
            module = getattr(block, part)
            module.register_forward_pre_hook(lambda _, args, key=f"{name}.{part}": seen.update({key: len(args[0])}))
    model(batch, torch.ones(4), layers=layers)
    return seen


def test_last_ffn_computes_masked_rows_if_the_heads_follow() -> None:
    batch = random_batch(CONFIG, 2, 2, 2)
    every, masked = batch.num_rows, sum(batch.term_counts)
    assert 0 < masked < every
    assert rows_seen(batch) == {f"{i}.{part}": every for i in range(3) for part in ("attention", "ffn")} | {
        "2.ffn": masked
    }
    # The heads may be on another stage, and features need all rows.
    assert set(rows_seen(batch, range(CONFIG.num_layers + 1)).values()) == {every}


def test_branches_do_not_compute_what_is_dropped() -> None:
    batch = random_batch(CONFIG, 3, 2, 3)
    drop_path = torch.full((8, 3, 2), 1.25)
    drop_path[[0, 4], 0, 0] = 0  # an image and a pair in the first attention
    drop_path[:, 1, 1] = 0  # everything in the second FFN
    batch = dataclasses.replace(batch, drop_path=drop_path)
    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    seen = rows_seen(batch)
    assert seen["0.attention"] == sum(lengths) - lengths[0] - lengths[4]
    assert seen["1.ffn"] == 0
    assert seen["0.ffn"] == seen["1.attention"] == seen["2.attention"] == sum(lengths)


@pytest.mark.parametrize(("dropped", "skips"), [(0, False), (1, False), (2, True)])
def test_few_dropped_rows_are_computed_with_the_others(dropped: int, skips: bool) -> None:
    """Checks that few dropped rows are computed with the others.

    For 1 of 40 images, skipping is slower, because all other rows must be copied. For 2 images it is faster.
    """
    drop_path = torch.ones(40, 3, 2)
    drop_path[:dropped] = 0
    batch = dataclasses.replace(random_batch(CONFIG, 40, 0, 0), drop_path=drop_path)
    assert (computed_sequences(batch, 0, 0) is not None) == skips
