"""Compares the bytes of live tensors with the formulas of docs/traffic_and_memory.md, within 5%."""

import functools

import pytest

from beit3_ds.config import RankCoords, RunConfig
from beit3_ds.planner import Memory, rank_memory
from tests.planner.cells import (
    DECOUPLED,
    FULL,
    STRICT,
    SUB_LN,
    TIED,
    SeenMemory,
    cell,
    measure_memory,
    rank_model_of,
    workloads_of,
)
from tests.ranks import run_ranks

TOLERANCE = 0.05

# The first layout of each number of ranks also shows that memory falls with the ranks.
CELLS: dict[int, dict[str, RunConfig]] = {
    1: {"dp1 ZeRO-3": cell(3, zero=STRICT)},
    2: {"dp2 ZeRO-3": cell(3, zero=STRICT), "dp2 ZeRO-2": cell(2)},
    4: {"tp2 pp2 ZeRO-1": cell(1, 3, tensor_parallel_size=2, pipeline_parallel_size=2)},
    8: {"tp2 pp2 dp2 ZeRO-3": cell(3, 3, zero=STRICT, tensor_parallel_size=2, pipeline_parallel_size=2)},
}
WIDE: dict[int, dict[str, RunConfig]] = {
    2: {
        "dp2 ZeRO-0": cell(0),
        **{f"dp2 ZeRO-{stage} bf16": cell(stage, bf16=True) for stage in range(4)},
        **{f"dp2 ZeRO-{stage} bf16, wide": cell(stage, bf16=True, wide=True) for stage in (1, 2, 3)},
        "dp2 ZeRO-1, overlapped": cell(1, zero={"overlap_comm": True}),
        "dp2 ZeRO-3, persistent": cell(3, zero={"stage3_param_persistence_threshold": 100}),
        "full recomputation": cell(3, zero=STRICT, training=FULL),
        "sub-LN": cell(1, model=SUB_LN),
        "decoupled": cell(2, model=DECOUPLED),
        "no stochastic depth": cell(1, model={"drop_path_rate": 0.0}),
        "tp2, sub-LN": cell(1, model=SUB_LN, tensor_parallel_size=2),
        "tp2 sequence parallel": cell(3, model=SUB_LN, tensor_parallel_size=2, sequence_parallel=True),
        "tp2 sequence parallel, full": cell(1, training=FULL, tensor_parallel_size=2, sequence_parallel=True),
        "tp2 sequence parallel, bf16": cell(1, bf16=True, tensor_parallel_size=2, sequence_parallel=True),
        "pp2, tied": cell(1, 4, model=TIED, pipeline_parallel_size=2),
        "pp2 x 2 interleaved": cell(2, 4, pipeline_parallel_size=2, virtual_pipeline_parallel_size=2),
        "pp2, full": cell(1, 4, training=FULL, pipeline_parallel_size=2),
    },
    4: {
        "dp4 ZeRO-2": cell(2, 4),
        "pp2 dp2 ZeRO-3": cell(3, 4, zero=STRICT, pipeline_parallel_size=2),
        "pp4 ZeRO-1": cell(1, 5, pipeline_parallel_size=4),
    },
}


@functools.cache
def measured(ranks: int) -> list[list[SeenMemory]]:
    """Returns the measurements of every rank for each layout of `CELLS`."""
    return run_ranks(measure_memory, ranks, list(CELLS[ranks].values()))


def modelled(config: RunConfig, ranks: int, seen: SeenMemory) -> Memory:
    """Returns the memory that the formulas predict for the measured rank."""
    return rank_memory(
        rank_model_of(config, ranks, seen.coords), workloads_of(config, seen.coords.data), seen.coords.data
    )


def check(config: RunConfig, ranks: int, seen: SeenMemory, name: str) -> None:
    """Compares each part separately, so that a wrong part cannot hide behind a larger one."""
    expected = modelled(config, ranks, seen)
    counted = {part: seen.states.get(part, 0) for part in ("parameters", "gradients", "optimizer")}
    counted |= {"buckets": seen.buckets, "gathered": seen.gathered, "activations": seen.activations}
    for part, num_bytes in counted.items():
        difference = abs(getattr(expected, part) - num_bytes)
        assert difference <= TOLERANCE * num_bytes, (
            f"{name}, {seen.coords}: {part} measured {num_bytes}, modelled {getattr(expected, part)}"
        )
    assert seen.states.get("other", 0) < 100, f"{name}: tensors that belong to no part: {seen.states}"


@pytest.mark.parametrize("ranks", [1, 2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_memory_is_as_modelled(ranks: int) -> None:
    for results in measured(ranks):
        for (name, config), seen in zip(CELLS[ranks].items(), results, strict=True):
            check(config, ranks, seen, name)


@pytest.mark.slow
def test_memory_falls_with_ranks() -> None:
    """Compares the states of the fullest rank.

    Two data-parallel ranks halve the states under ZeRO-3, and all three axes together shrink them further.
    """
    states = {}
    for ranks in CELLS:
        first = [results[0].states for results in measured(ranks)]
        states[ranks] = max(sum(own[part] for part in ("parameters", "gradients", "optimizer")) for own in first)
    assert states[2] == pytest.approx(states[1] / 2, rel=0.01)
    assert states[1] > states[2] > states[8]
    assert states[1] > states[4] > states[8]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", WIDE)
def test_memory_of_more_layouts_is_as_modelled(ranks: int) -> None:
    for results in run_ranks(measure_memory, ranks, list(WIDE[ranks].values())):
        for (name, config), seen in zip(WIDE[ranks].items(), results, strict=True):
            check(config, ranks, seen, name)


def test_averages_take_the_bytes_of_the_float32_weights() -> None:
    plain, averaged = (cell(2, training={"ema_decay": decay}) for decay in (None, 0.9))
    sizes = [rank_memory(rank_model_of(config, 2, RankCoords(0, 0, 0)), ()).optimizer for config in (plain, averaged)]
    assert 4 * sizes[0] == 3 * sizes[1] > 0  # weights and two moments; then an average beside them
