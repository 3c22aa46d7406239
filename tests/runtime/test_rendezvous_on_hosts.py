"""Tests that ranks of several hosts meet over the right interface, or report the reason."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from beit3_ds.runtime.run_secret import SECRET_FILE, read_secret
from tests.hosts import INTERFACE, Host, missing_for_hosts
from tests.slurm import PROGRAMS as SLURM
from tests.slurm import start_slurm, stop_slurm

RENDEZVOUS = [sys.executable, "-m", "tests.runtime.rendezvous_program"]
BOUND_SECONDS = 120


@pytest.fixture(autouse=True)
def secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes the secret of the ranks to a shared file; each host has its own temporary folder."""
    read_secret(None, str(tmp_path))
    monkeypatch.setenv("BEIT3_SECRET_FILE", path := str(tmp_path / SECRET_FILE))
    return path


def meet(
    hosts: Sequence[Host], master: str, port: int, seconds: int, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Starts a rank on each host; returns their outputs."""
    ranks = []
    for rank, host in enumerate(hosts):
        names = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": len(hosts), "MASTER_PORT": port, "MASTER_ADDR": master}
        variables = {
            "BEIT3_SECRET_FILE": os.environ["BEIT3_SECRET_FILE"],
            **{name: str(value) for name, value in names.items()},
            **(environment or {}),
        }
        argv = [*RENDEZVOUS, str(seconds)]
        ranks.append(host.start(argv, variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    return [rank.communicate(timeout=BOUND_SECONDS)[0] for rank in ranks]


@pytest.mark.slow
def test_srun_starts_ranks_that_meet(debian_hosts: list[Host], tmp_path: Path) -> None:
    """Checks ranks started by srun, where MASTER_ADDR resolves to 127.0.1.1 on the first host."""
    if reason := missing_for_hosts(*SLURM):
        pytest.skip(reason)
    environment = {**start_slurm(debian_hosts, tmp_path), "BEIT3_SECRET_FILE": os.environ["BEIT3_SECRET_FILE"]}
    done = debian_hosts[0].run(["srun", "--nodes=2", "--ntasks=3", *RENDEZVOUS, "60"], environment)
    stop_slurm(debian_hosts)
    assert done.returncode == 0, done.stdout
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    assert said == [f"rank {rank}: sum 111 over {INTERFACE}" for rank in range(3)]


@pytest.mark.slow
def test_an_unreachable_host_is_named_by_all(debian_hosts: list[Host]) -> None:
    """Catches an endless wait behind a dead link, which looks like a wrong address or a closed firewall."""
    debian_hosts[1].cut_link()
    try:
        first, second = meet(debian_hosts, "10.1.0.1", 29502, 5)
    finally:
        debian_hosts[1].restore_link()
    assert "rank 0: rank 1 of 2 did not come within 5 s to MASTER_ADDR=10.1.0.1, MASTER_PORT=29502" in first
    assert "rank 1: host node1 cannot reach rank 0 at MASTER_ADDR=10.1.0.1, MASTER_PORT=29502: " in second
    assert "timed out" in second or "No route to host" in second


@pytest.mark.slow
def test_an_interface_that_leads_nowhere_is_named(debian_hosts: list[Host]) -> None:
    """Checks that a user's wrong choice of interface is kept and reported.

    All ranks meet at the address of rank 0, but cannot connect to each other.
    """
    for line in meet(debian_hosts, "10.1.0.1", 29503, 8, {"GLOO_SOCKET_IFNAME": "lo"}):
        assert "ranks met at MASTER_ADDR=10.1.0.1, MASTER_PORT=29503" in line and "any port" in line
        assert re.search(r"GLOO_SOCKET_IFNAME=lo or|GLOO_SOCKET_IFNAME \(lo here\)", line), (
            line
        )  # gloo may give up first
