"""Compares the replay of DeepSpeed's parameter coordinator with a formula."""

import pytest

from beit3_ds.config import RankCoords
from beit3_ds.planner.zero3_replay import Zero3Replay, padded, persistent_parameters
from tests.planner.cells import STRICT, cell, rank_model_of


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_zero3_without_prefetch_gathers_before_every_use(checkpointing: str) -> None:
    """Checks the replay without prefetching and reuse; tests/planner/test_traffic.py counts the other cases."""
    config = cell(3, 4, zero=STRICT, training={"activation_checkpointing": checkpointing})
    rank_model = rank_model_of(config, 3, RankCoords(0, 0, 0))
    calls, elements = Zero3Replay(rank_model).run_step(4)
    # Each of 4 micro-batches gathers all parameters before forward and before backward. A block is gathered in one
    # call, and is still gathered when it is recomputed.
    assert elements == 4 * 2 * sum(padded(parameter.numel(), 3) for parameter in rank_model.model.parameters())
    blocks = set(rank_model.model.blocks.values())
    in_blocks = {module for block in blocks for module in block.modules()}
    others = [m for m in rank_model.model.modules() if m not in in_blocks and list(m.parameters(recurse=False))]
    assert calls == 4 * 2 * (len(blocks) + len(others))


def test_persistent_parameters_are_those_up_to_the_threshold() -> None:
    rank_model = rank_model_of(cell(3, zero={"stage3_param_persistence_threshold": 48}), 2, RankCoords(0, 0, 0))
    sizes = {p.numel() for p in persistent_parameters(rank_model)}
    assert sizes == {p.numel() for p in rank_model.model.parameters() if p.numel() <= 48} and max(sizes) == 48
    assert persistent_parameters(rank_model_of(cell(2), 2, RankCoords(0, 0, 0))) == []
