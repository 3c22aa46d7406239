"""Tests which ranks meet to measure a link, and the measured values."""

import itertools
import os
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.cluster.check.link_worker import Worker, pair_rounds
from beit3_ds.runtime import keyed_store
from tests.listeners import listeners
from tests.ranks import run_ranks


@given(st.integers(1, 65))
def test_everyone_meets_everyone_once_in_rounds_of_disjoint_pairs(size: int) -> None:
    rounds = pair_rounds(size)
    assert len(rounds) == size - 1 + size % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(size), 2))
    for pairs in rounds:
        met = [player for pair in pairs for player in pair]
        assert len(met) == len(set(met)) == size - size % 2


def _measure() -> dict[str, Any]:
    worker = Worker(
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        address="127.0.0.1",
        port=int(os.environ["MASTER_PORT"]),
        backend="gloo",
        store_text=Path(keyed_store.__file__).read_text(),
        secret="00" * 32,
    )
    assert not {address for address, _ in listeners()} & {"0.0.0.0", "::"}  # where torch listens by default
    rates = worker.measure([[list(pair) for pair in pairs] for pairs in pair_rounds(3)])
    return {"rates": rates, "all_reduce": worker.all_reduce(1e9)}


def test_every_rank_measures_its_links() -> None:
    for rank, found in enumerate(run_ranks(_measure, 3)):
        assert sorted(found["rates"]) == [str(other) for other in range(3) if other != rank]
        for rate in (*found["rates"].values(), found["all_reduce"]):
            assert 1e7 < rate < 1e13  # bits per second over loopback: not bytes per millisecond, not zero
