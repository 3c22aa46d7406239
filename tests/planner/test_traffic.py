"""Compares the calls of ranks in a step with the formulas of docs/traffic_and_memory.md."""

from typing import Any

import pytest

from beit3_ds.config import RunConfig
from beit3_ds.planner import step_traffic
from tests.planner.cells import (
    DECOUPLED,
    FULL,
    IMAGES,
    PAIRS,
    STRICT,
    SUB_LN,
    TIED,
    cell,
    measure_traffic,
    rank_model_of,
    workloads_of,
)
from tests.ranks import run_ranks

PERSIST = {"stage3_param_persistence_threshold": 100}
SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_parallel_size": 2}
INTERLEAVED = {"pipeline_parallel_size": 2, "virtual_pipeline_parallel_size": 2}

ONE_RANK = {"dp1 ZeRO-3": cell(3), "dp1 ZeRO-1 bf16": cell(1, bf16=True)}
TWO_RANKS = {
    "dp2 ZeRO-0": cell(0),
    "dp2 ZeRO-1": cell(1),
    "dp2 ZeRO-2": cell(2),
    "dp2 ZeRO-3": cell(3, zero=STRICT),
    "dp2 ZeRO-3, persistent": cell(3, zero=STRICT | PERSIST),
    "dp2 ZeRO-3, DeepSpeed's prefetch and reuse": cell(3, zero=PERSIST),
    "dp2 ZeRO-3, some prefetch and reuse": cell(
        3, zero={"stage3_prefetch_bucket_size": 3000, "stage3_max_reuse_distance": 30000}
    ),
    "dp2 ZeRO-3, full recomputation": cell(3, zero=STRICT, training=FULL),
    "tp2": cell(0, tensor_parallel_size=2),
    "tp2 sequence parallel, sub-LN": cell(1, model=SUB_LN, **SEQUENCE),
    "tp2 full recomputation": cell(0, model=SUB_LN, training=FULL, tensor_parallel_size=2),
    "dp2 ZeRO-3, pairs alone": cell(3, zero=PERSIST, model=PAIRS),
    "tp2 sequence parallel, images alone": cell(1, model=IMAGES, **SEQUENCE),
    "pp2, 2 micro-batches": cell(1, 2, **PIPELINE),
    "pp2, 4 micro-batches, tied": cell(1, 4, model=TIED, **PIPELINE),
    "pp2 x 2 interleaved": cell(1, 4, **INTERLEAVED),
}
EIGHT_RANKS = {"tp2 pp2 dp2 ZeRO-3": cell(3, 4, zero=STRICT, tensor_parallel_size=2, **PIPELINE)}

WIDE_TWO_RANKS = {
    **{f"dp2 ZeRO-{stage} bf16": cell(stage, bf16=True) for stage in range(4)},
    "dp2 ZeRO-3, sub-LN": cell(3, zero=STRICT, model=SUB_LN),
    "dp2 ZeRO-3, sub-LN, defaults": cell(3, model=SUB_LN),
    "dp2 ZeRO-3, full, no stochastic depth": cell(3, zero=STRICT, training=FULL, model={"drop_path_rate": 0.0}),
    "dp2 ZeRO-3, full, defaults": cell(3, zero=PERSIST, training=FULL),
    "dp2 ZeRO-3, tied": cell(3, zero=STRICT, model=TIED),
    "dp2 ZeRO-2, decoupled": cell(2, model=DECOUPLED),
    "tp2 bf16": cell(0, bf16=True, tensor_parallel_size=2),
    "tp2 ZeRO-3": cell(3, tensor_parallel_size=2),
    "tp2 sub-LN": cell(0, model=SUB_LN, tensor_parallel_size=2),
    "tp2 full, no stochastic depth": cell(0, training=FULL, model={"drop_path_rate": 0.0}, tensor_parallel_size=2),
    "tp2 sequence parallel, full": cell(0, model=DECOUPLED, training=FULL, **SEQUENCE),
    "tp2 sequence parallel, full, no stochastic depth": cell(
        0, training=FULL, model={"drop_path_rate": 0.0}, **SEQUENCE
    ),
    "pp2 ZeRO-3 bf16": cell(3, 4, bf16=True, **PIPELINE),
    "pp2 ZeRO-1 bf16, wide": cell(1, 4, bf16=True, wide=True, **PIPELINE),
}
WIDE_FOUR_RANKS = {
    "dp4 ZeRO-2, overlapped": cell(2, zero={"overlap_comm": True}),
    "dp4 ZeRO-3": cell(3, zero=PERSIST),
    "tp4 sequence parallel": cell(1, tensor_parallel_size=4, sequence_parallel=True),
    "tp2 dp2 ZeRO-3 sequence parallel, full": cell(3, zero=STRICT, training=FULL, **SEQUENCE),
    "tp2 dp2 ZeRO-1 bf16": cell(1, bf16=True, tensor_parallel_size=2),
    "pp2 dp2 ZeRO-0": cell(0, 4, **PIPELINE),
    "pp2 dp2 ZeRO-2": cell(2, 4, **PIPELINE),
    "pp2 dp2 ZeRO-3": cell(3, 4, zero=STRICT, **PIPELINE),
    "pp2 dp2 ZeRO-3, defaults, persistent": cell(3, 4, zero=PERSIST, **PIPELINE),
    "pp2 dp2 ZeRO-3, full": cell(3, 4, zero=PERSIST, training=FULL, **PIPELINE),
    "pp2 dp2 ZeRO-3, tied": cell(3, 4, zero=STRICT, model=TIED, **PIPELINE),
    "pp2 dp2 ZeRO-2, interleaved": cell(2, 4, **INTERLEAVED),
    "pp2 dp2 ZeRO-3, interleaved": cell(3, 4, zero=PERSIST, **INTERLEAVED),
    "pp2 tp2 sequence parallel": cell(1, 4, **SEQUENCE, **PIPELINE),
}


def check(ranks: int, cells: dict[str, RunConfig]) -> None:
    """Compares calls and bytes of every axis and kind on every rank, except host values."""
    wrong: list[str] = []
    by_rank = run_ranks(measure_traffic, ranks, list(cells.values()))
    for number, (name, config) in enumerate(cells.items()):
        for seen in (results[number] for results in by_rank):
            traffic = step_traffic(rank_model_of(config, ranks, seen.coords), workloads_of(config, seen.coords.data))
            counted: dict[Any, Any] = {key: value for key, value in seen.traffic.items() if key[0] != "host"}
            expected = {key: tuple(volume) for key, volume in traffic.volumes.items()}
            wrong += [
                f"{name}, {seen.coords}: {key} counted {counted.get(key)}, expected {expected.get(key)}"
                for key in sorted(counted.keys() | expected.keys())
                if counted.get(key) != expected.get(key)
            ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("ranks", "cells"),
    [
        pytest.param(1, ONE_RANK, id="1 rank"),
        pytest.param(2, TWO_RANKS, id="2 ranks"),
        pytest.param(8, EIGHT_RANKS, id="8 ranks"),
        pytest.param(2, WIDE_TWO_RANKS, id="wide, 2 ranks", marks=pytest.mark.slow),
        pytest.param(4, WIDE_FOUR_RANKS, id="wide, 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_counted_traffic_equals_the_formula(ranks: int, cells: dict[str, RunConfig]) -> None:
    """Catches an additional all-reduce, a missing gather, and a message of another size, on any axis."""
    check(ranks, cells)
