"""Tests that an attempt numbers its ranks in the order of its hosts."""

from pathlib import Path

from beit3_ds.cluster.hostfile import HostSlots
from beit3_ds.cluster.launch.attempt_plan import AttemptPlan


def test_ranks_fill_the_hosts_in_order() -> None:
    plan = AttemptPlan(
        hosts=[HostSlots("b", 2), HostSlots("a", 1)],
        build_commands=lambda arguments: [arguments],
        launcher_environment={},
        trainer=["true"],
        environment={},
        folder=Path("/"),
        log_dir=Path("/logs"),
        address="127.0.0.1",
        port=0,
        keepalive_seconds=15.0,
        start_seconds=180.0,
    )
    assert plan.world_size == 3
    assert [plan.host_of(rank) for rank in range(3)] == ["b", "b", "a"]
