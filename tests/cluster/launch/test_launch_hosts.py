"""Tests `beit3 launch` across hosts with real launchers and the real trainer, also with faults."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.slices import whole_slice
from tests.checkpoint.training_run import TrainingRun, check_same_state
from tests.cluster.launch.test_plain_launchers import ENVIRONMENT, check_run, needs
from tests.hosts import Host, namespace_hosts, write_hostfile
from tests.slurm import PROGRAMS as SLURM_PROGRAMS
from tests.slurm import start_slurm, stop_slurm
from tests.test_train import write

END_SECONDS = 30
"""Longest time from a fault to the end of all processes, in seconds."""
START_SECONDS = 180
BEIT3 = [sys.executable, "-m", "beit3_ds.cli.main", "launch"]


class HostsLaunch:
    """Runs a launch on the first of several hosts, and injects faults."""

    def __init__(self, hosts: list[Host], hostfile: Path, config: Path, *options: str) -> None:
        self.hosts, self._printed = hosts, config.with_name(f"printed_{time.monotonic_ns()}")
        with self._printed.open("w") as file:
            argv = [*BEIT3, str(hostfile), str(config), *options]
            self.process = hosts[0].start(argv, ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT)

    def printed(self) -> str:
        return self._printed.read_text()

    def pid(self, pattern: str, host: int = 0) -> int:
        (pid,) = self.hosts[host].pids(pattern)
        return pid

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while text not in self.printed():
            assert time.monotonic() < deadline and self.process.poll() is None, self.printed()
            time.sleep(0.05)

    def wait(self, seconds: float) -> int:
        """Waits for the end and returns the exit status; fails if a rank is left on any host."""
        deadline = time.monotonic() + seconds
        try:
            status = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not ended after {seconds} s: {self.printed()}") from None
        while left := [pid for host in self.hosts for pid in host.pids("beit3_ds.train|rank_guard|deepspeed")]:
            assert time.monotonic() < deadline, f"{left} are left: {self.printed()}"
            time.sleep(0.1)
        return status


@contextmanager
def launched(hosts: list[Host], hostfile: Path, config: Path, *options: str) -> Iterator[HostsLaunch]:
    """Starts a launch; the creator of the hosts ends remaining processes."""
    launch = HostsLaunch(hosts, hostfile, config, *options)
    try:
        yield launch
    finally:
        launch.process.kill()
        launch.process.wait()


@pytest.fixture
def long_run(run_mapping: dict[str, Any]) -> dict[str, Any]:
    """Returns a run of forty steps under ZeRO-3 that saves after each step."""
    own = run_mapping["beit3_ds"]
    own["training"] |= {"total_steps": 40, "eval_interval": 1000, "save_interval": 1, "keep_checkpoints": 100}
    own["parallel"] = {"timeout_seconds": 60}
    return run_mapping


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param("pdsh", marks=needs("pdsh")),
        pytest.param("ssh", marks=[pytest.mark.slow, needs()]),
        pytest.param("openmpi", marks=[pytest.mark.slow, needs("mpirun")]),
        pytest.param("slurm", marks=[pytest.mark.slow, needs(*SLURM_PROGRAMS)]),
    ],
)
def test_it_trains_what_one_process_trains(
    launcher: str, debian_hosts: list[Host], run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    run_mapping["beit3_ds"]["training"] |= {"total_steps": 3, "eval_interval": 3, "save_interval": 3}
    hostfile = write_hostfile(tmp_path / "hostfile", debian_hosts)
    argv = [*BEIT3, str(hostfile), str(write(run_mapping, tmp_path)), "--launcher", launcher]
    environment = start_slurm(debian_hosts, tmp_path) if launcher == "slurm" else {}
    printed = check_run(debian_hosts, argv, run_mapping, tmp_path, environment)
    if launcher == "slurm":
        stop_slurm(debian_hosts)
    assert "beit3 launch: started 2 ranks on node0, node1" in printed
    assert "beit3 launch: finished: 3 steps" in printed
    for rank in range(2):
        assert (tmp_path / "run" / "logs" / "attempt_1" / f"rank_{rank}.log").exists()
    assert not [pid for host in debian_hosts for pid in host.pids("beit3_ds|deepspeed|^pdsh")]


@pytest.mark.slow
@needs("pdsh")
def test_a_host_that_is_gone_is_named_before_anything_starts(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    with namespace_hosts(3) as hosts:
        hostfile = write_hostfile(tmp_path / "hostfile", hosts[:2])
        hosts[1].crash()
        hosts[2].stop_sshd()
        with launched(hosts, hostfile, write(run_mapping, tmp_path)) as launch:
            assert launch.wait(END_SECONDS) == 2
        assert re.search(r"^error: hostfile \S+: host node1 cannot be reached: ssh: connect", launch.printed(), re.M)
        with launched(hosts, write_hostfile(hostfile, [hosts[0], hosts[2]]), tmp_path / "config.json") as launch:
            assert launch.wait(END_SECONDS) == 2
        assert (
            "host node2 cannot be reached: ssh: connect to host node2 port 22: Connection refused" in launch.printed()
        )
    assert not (tmp_path / "run" / "logs" / "attempt_1").exists()


def kill_rank(launch: HostsLaunch) -> None:
    os.kill(launch.pid("beit3_ds.train", 1), signal.SIGKILL)


def stop_rank(launch: HostsLaunch) -> None:
    os.kill(launch.pid("beit3_ds.train", 1), signal.SIGSTOP)


def cut_link(launch: HostsLaunch) -> None:
    launch.hosts[1].cut_link()


def stop_launch(launch: HostsLaunch) -> None:
    os.kill(launch.pid(r"beit3_ds\.cli\.main launch"), signal.SIGTERM)


def kill_launch(launch: HostsLaunch) -> None:
    os.kill(launch.pid(r"beit3_ds\.cli\.main launch"), signal.SIGKILL)


@pytest.mark.slow
@needs("pdsh")
@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        (kill_rank, 1, r"FAILED after \d+ s: rank 1 on host node1 was killed by SIGKILL"),
        (stop_rank, 1, r"FAILED after \d+ s: rank 1 on host node1 has been stopped \(state T\) for \d+ s"),
        (cut_link, 1, r"FAILED after \d+ s: host node1 \(rank 1\) has been silent for 15 s"),
        (stop_launch, 128 + 15, r"stopped by SIGTERM: the checkpoint of step \d+ of 40 is saved"),
        (kill_launch, None, ""),
    ],
)
def test_a_fault_ends_all_ranks_and_the_run_goes_on(
    fault: Callable[[HostsLaunch], None],
    status: int | None,
    message: str,
    two_hosts: list[Host],
    long_run: dict[str, Any],
    tmp_path: Path,
) -> None:
    """Catches ranks that are left behind, a launcher that hangs, and lost work."""
    hostfile, config = write_hostfile(tmp_path / "hostfile", two_hosts), write(long_run, tmp_path)
    with launched(two_hosts, hostfile, config) as launch:
        launch.wait_for("step 5/40")
        fault(launch)
        ended = launch.wait(END_SECONDS)
    assert status is None or ended == status
    assert re.search(message, launch.printed()), launch.printed()
    two_hosts[1].restore_link()
    with launched(two_hosts, hostfile, config) as launch:
        assert launch.wait(START_SECONDS) == 0
    (first,) = re.findall(r"resuming after step (\d+) from", launch.printed())
    assert int(first) >= 4
    alone = TrainingRun(long_run, tmp_path / "alone")
    assert alone.finish() == [0]
    check_close(CheckpointFolder(tmp_path / "run" / "checkpoints" / "step-00000040"), alone.checkpoint(40))


@pytest.mark.slow
@needs("pdsh")
def test_restarts_survive_three_faults(long_run: dict[str, Any], tmp_path: Path) -> None:
    """Checks three automatic restarts; the last has one rank less, because a host has crashed."""
    with namespace_hosts(2) as hosts:
        hostfile, config = write_hostfile(tmp_path / "hostfile", hosts), write(long_run, tmp_path)
        with launched(hosts, hostfile, config, "--restarts", "3") as launch:
            launch.wait_for("step 5/40")
            kill_rank(launch)
            launch.wait_for("restart 1 of 3: 2 ranks on node0 (1), node1 (1), from the checkpoint of step ")
            launch.wait_for("step 15/40")
            stop_rank(launch)
            launch.wait_for("restart 2 of 3: 2 ranks on node0 (1), node1 (1), from the checkpoint of step ")
            launch.wait_for("step 25/40")
            hosts[1].crash()
            launch.wait_for("restart 3 of 3 without node1 (not reachable): 1 rank instead of 2 on node0 (1), from the ")
            assert launch.wait(START_SECONDS) == 0
        # Only what was done after the newest checkpoint is done again.
        steps = [int(step) for step in re.findall(r"^step (\d+)/40", launch.printed(), re.MULTILINE)]
        resumed = [int(step) for step in re.findall(r"resuming after step (\d+) from", launch.printed())]
        assert len(resumed) == 3 and len(steps) <= 40 + 3 * 3
    checkpoints = tmp_path / "run" / "checkpoints"
    long_run["beit3_ds"]["training"]["output_dir"] = str(tmp_path / "undisturbed")
    undisturbed = TrainingRun(long_run, tmp_path / "two", 2)
    assert undisturbed.finish() == [0, 0]
    check_same_state(CheckpointFolder(checkpoints / f"step-{resumed[2]:08d}"), undisturbed.checkpoint(resumed[2]))
    check_close(CheckpointFolder(checkpoints / "step-00000040"), undisturbed.checkpoint(40))


@pytest.mark.slow
@needs("pdsh")
def test_other_software_on_a_host_is_named(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Checks that hosts with different software are reported without a restart, which could not help."""
    (metadata := tmp_path / "planted" / "torch-9.9.9.dist-info").mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    (only := tmp_path / "only").mkdir()
    with namespace_hosts(2) as hosts:
        hosts[1].run(["mount", "--bind", str(metadata.parent), str(only)])
        hostfile, config = write_hostfile(tmp_path / "hostfile", hosts), write(run_mapping, tmp_path)
        options = ("--restarts", "3", "--env", f"PYTHONPATH={only}")
        with launched(hosts, hostfile, config, *options) as launch:
            launch.wait_for("FAILED")
            assert launch.wait(END_SECONDS) == 2
    said = r"error on rank \d: rank 1 \(host node1\) has torch 9\.9\.9, rank 0 \(host node0\) has 2\."
    assert re.search(said, launch.printed()), launch.printed()
    assert "restart 1" not in launch.printed()


@pytest.mark.slow
@needs("pdsh")
def test_a_full_disk_is_named_and_not_met_again(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Checks that a full disk gives status 2 without a restart, which would meet the full disk again.

    Logs are on another disk.
    """
    (tmp_path / "run").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "run"], check=True)
    try:
        with namespace_hosts(2) as hosts:
            hostfile, config = write_hostfile(tmp_path / "hostfile", hosts), write(run_mapping, tmp_path)
            options = ("--restarts", "3", "--log-dir", str(tmp_path / "logs"))
            with launched(hosts, hostfile, config, *options) as launch:
                assert launch.wait(START_SECONDS) == 2
    finally:
        subprocess.run(["umount", tmp_path / "run"], check=True)
    failed = re.search(r"FAILED .* rank \d on host node\d ended with status 2.*\n((?:    \| .*\n)+)", launch.printed())
    assert failed and "could not be written: [Errno 28] No space left on device (rank " in failed[1], launch.printed()
    assert "restart 1" not in launch.printed()


def check_close(ours: CheckpointFolder, expected: CheckpointFolder) -> None:
    """Checks that weights agree up to sums in a different order."""
    assert ours.step == expected.step
    for name in expected.names():
        part = whole_slice(expected.shape(name))
        torch.testing.assert_close(
            ours.read_kind("weight", name, part), expected.read_kind("weight", name, part), rtol=1e-4, atol=1e-4
        )
