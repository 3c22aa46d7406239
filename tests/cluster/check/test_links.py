"""Measuring links: who meets whom, what is measured, and which links are called slow."""

import itertools
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.cluster.check.link_worker import Worker, pair_rounds
from beit3_ds.cluster.check.links import Links, describe_links, link_speed_faults
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
    )
    rates = worker.measure([[list(pair) for pair in pairs] for pairs in pair_rounds(3)])
    return {"rates": rates, "all_reduce": worker.all_reduce(1e9)}


def test_every_rank_measures_its_links() -> None:
    for rank, found in enumerate(run_ranks(_measure, 3)):
        assert sorted(found["rates"]) == [str(other) for other in range(3) if other != rank]
        for rate in (*found["rates"].values(), found["all_reduce"]):
            assert 1e7 < rate < 1e13  # bits a second over loopback: not bytes a millisecond, not zero


def _links(size: int, slow: dict[tuple[int, int], float], usual: float = 10e9) -> Links:
    names = [f"n{i}" for i in range(size)]
    rates = {
        (names[i], names[j]): slow.get((i, j), usual * (1 + (i + 2 * j) % 7 / 20))
        for i, j in itertools.permutations(range(size), 2)
    }
    return Links("gloo", rates, 1e9)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_healthy_links_that_scatter_are_no_fault(size: int) -> None:
    links = _links(size, {})
    assert not list(link_speed_faults(links, None))
    assert not list(link_speed_faults(links, 10e9))
    assert len(list(link_speed_faults(links, 1000e9))) >= size  # every node sends too slowly
    assert f"over {size} nodes" in describe_links(links)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_one_slow_direction_is_named(size: int) -> None:
    (fault,) = link_speed_faults(_links(size, {(0, 1): 3e9}), None)
    assert str(fault).startswith("n0: sends to n1 at 3 Gbit/s, below half of the 1")


@pytest.mark.parametrize("size", [3, 4, 64])
def test_a_slow_node_is_one_fault_though_most_links_of_three_nodes_are_slow(size: int) -> None:
    slow = {(2, other): 1e9 for other in range(size) if other != 2}
    (fault,) = link_speed_faults(_links(size, slow), None)
    assert str(fault).startswith("n2: sends to every other node at 1 Gbit/s at most")
    slow = {(other, 2): 1e9 for other in range(size) if other != 2}
    (fault,) = link_speed_faults(_links(size, slow), None)
    assert str(fault).startswith("n2: receives from every other node at 1 Gbit/s at most")


def test_a_thin_line_between_two_racks_is_found() -> None:
    slow = {(i, j): 1e9 for i, j in itertools.permutations(range(8), 2) if i // 4 != j // 4}
    assert len(list(link_speed_faults(_links(8, slow), None))) == 32


def test_links_that_are_all_slow_are_below_the_floor() -> None:
    assert not list(link_speed_faults(_links(2, {}, usual=0.9e9), None))  # 1 GbE
    assert len(list(link_speed_faults(_links(2, {}, usual=0.09e9), None))) == 2
    assert not list(link_speed_faults(_links(2, {}, usual=0.09e9), 0.1e9))  # expected
