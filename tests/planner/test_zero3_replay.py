"""Compares the replay of DeepSpeed's parameter coordinator with a formula."""

import pytest

from beit3_ds.config import RankCoords
from beit3_ds.planner.zero3_replay import Zero3Replay, padded, persistent_parameters
from tests.planner.cells import STRICT, cell, rank_model_of


@pytest.mark.parametrize(("checkpointing", "block_gathers"), [("none", 2), ("full", 3)])
def test_zero3_without_prefetch_gathers_before_every_use(checkpointing: str, block_gathers: int) -> None:
    """Holds without prefetching and reuse; tests/planner/test_traffic.py counts the other cases."""
    config = cell(3, 4, zero=STRICT, training={"activation_checkpointing": checkpointing})
    rank_model = rank_model_of(config, 3, RankCoords(0, 0, 0))
    calls, elements = Zero3Replay(rank_model).run_step(4)
    blocks, rest = 0, 0
    for name, parameter in rank_model.model.named_parameters():
        size = padded(parameter.numel(), 3)
        blocks, rest = (blocks + size, rest) if name.startswith("blocks.") else (blocks, rest + size)
    modules = [m for m in rank_model.model.modules() if list(m.parameters(recurse=False))]
    in_blocks = [
        m for block in rank_model.model.blocks.values() for m in block.modules() if list(m.parameters(recurse=False))
    ]
    # Recomputation begins inside the block's last linear layer, which is gathered already.
    last = [block.ffn.fc2 for block in rank_model.model.blocks.values()] if checkpointing == "full" else []
    again = sum(padded(p.numel(), 3) for module in last for p in module.parameters())
    assert elements == 4 * (block_gathers * blocks - again + 2 * rest)
    assert calls == 4 * (block_gathers * len(in_blocks) - len(last) + 2 * (len(modules) - len(in_blocks)))


def test_persistent_parameters_are_those_up_to_the_threshold() -> None:
    rank_model = rank_model_of(cell(3, zero={"stage3_param_persistence_threshold": 48}), 2, RankCoords(0, 0, 0))
    sizes = {p.numel() for p in persistent_parameters(rank_model)}
    assert sizes == {p.numel() for p in rank_model.model.parameters() if p.numel() <= 48} and max(sizes) == 48
    assert persistent_parameters(rank_model_of(cell(2), 2, RankCoords(0, 0, 0))) == []
