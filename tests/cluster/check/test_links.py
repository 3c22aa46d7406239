"""Tests which measured links are reported as slow."""

import itertools

import pytest

from beit3_ds.cluster.check.links import Links, describe_links, find_slow_links


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
    assert not list(find_slow_links(links, None))
    assert not list(find_slow_links(links, 10e9))
    assert len(list(find_slow_links(links, 1000e9))) >= size  # every node sends too slowly
    assert f"over {size} nodes" in describe_links(links)


@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_one_slow_direction_is_named(size: int) -> None:
    (fault,) = find_slow_links(_links(size, {(0, 1): 3e9}), None)
    assert str(fault).startswith("n0: sends to n1 at 3 Gbit/s, below half of the 1")


@pytest.mark.parametrize("size", [3, 4, 64])
def test_a_slow_node_is_one_fault_though_most_links_of_three_nodes_are_slow(size: int) -> None:
    slow = {(2, other): 1e9 for other in range(size) if other != 2}
    (fault,) = find_slow_links(_links(size, slow), None)
    assert str(fault).startswith("n2: sends to every other node at 1 Gbit/s at most")
    slow = {(other, 2): 1e9 for other in range(size) if other != 2}
    (fault,) = find_slow_links(_links(size, slow), None)
    assert str(fault).startswith("n2: receives from every other node at 1 Gbit/s at most")


def test_a_thin_line_between_two_racks_is_found() -> None:
    slow = {(i, j): 1e9 for i, j in itertools.permutations(range(8), 2) if i // 4 != j // 4}
    assert len(list(find_slow_links(_links(8, slow), None))) == 32


def test_links_that_are_all_slow_are_below_the_floor() -> None:
    assert not list(find_slow_links(_links(2, {}, usual=0.9e9), None))  # 1 GbE
    assert len(list(find_slow_links(_links(2, {}, usual=0.09e9), None))) == 2
    assert not list(find_slow_links(_links(2, {}, usual=0.09e9), 0.1e9))  # expected
