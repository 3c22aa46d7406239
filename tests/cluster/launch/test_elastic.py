"""Tests the search for the largest part of the remaining hosts on which a run fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.elastic import largest_fit
from beit3_ds.config import build_run_config, fits_layout
from tests.run_config import small_run_mapping

HOSTS = st.lists(st.integers(1, 8), min_size=0, max_size=5).map(
    lambda slots: [HostSlots(f"node{index}", count) for index, count in enumerate(slots)]
)
FITTING = st.sets(st.integers(1, 40))


@given(HOSTS, FITTING, st.booleans(), st.integers(1, 10))
def test_largest_fit(hosts: list[HostSlots], fitting: set[int], equal_slots: bool, min_ranks: int) -> None:
    chosen = largest_fit(hosts, fitting.__contains__, equal_slots=equal_slots, min_ranks=min_ranks)
    counts = [host.slots for host in hosts]
    if equal_slots:
        possible = {slots * n for slots in range(1, 9) for n in range(1, sum(c >= slots for c in counts) + 1)}
    else:
        possible = set(range(1, sum(counts) + 1))
    best = max((n for n in possible & fitting if n >= min_ranks), default=None)
    if best is None:
        assert chosen is None
        return
    assert chosen is not None and sum(host.slots for host in chosen) == best
    slots_of = {host.name: host.slots for host in hosts}
    assert all(1 <= host.slots <= slots_of[host.name] for host in chosen)
    names = [host.name for host in chosen]
    assert names == sorted(set(names))  # each once, in the order of the ranks
    if equal_slots:
        assert len({host.slots for host in chosen}) == 1
    else:
        assert all(host.slots == slots_of[host.name] for host in chosen[:-1])  # tensor-parallel peers stay together


@pytest.mark.parametrize(
    ("slots", "tensor", "stages", "ranks"), [(4, 1, 1, 28), (4, 2, 2, 28), (3, 2, 2, 20), (3, 2, 1, 20), (1, 1, 1, 7)]
)
def test_seven_of_eight_hosts_go_on(slots: int, tensor: int, stages: int, ranks: int) -> None:
    """Checks that 7 of 8 hosts use the most ranks that form whole copies of the model.

    The number of samples does not matter.
    """
    mapping = small_run_mapping(1, samples=(16, 16, 16), accumulation=2)
    mapping["beit3_ds"]["parallel"] = {"tensor_parallel_size": tensor, "pipeline_parallel_size": stages}
    config = build_run_config(mapping)
    hosts = [HostSlots(f"node{number}", slots) for number in range(8)]
    assert fits_layout(config, 8 * slots)
    chosen = largest_fit(hosts[1:], lambda ranks: fits_layout(config, ranks), equal_slots=False)
    assert chosen is not None
    assert sum(host.slots for host in chosen) == ranks
