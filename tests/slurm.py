"""Runs Slurm on the test hosts."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from tests.hosts import Host

PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
_READY_SECONDS = 60
_CONFIG = """
ClusterName=test
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir=/run/slurmd
StateSaveLocation=/run/slurmctld
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName={names} CPUs=2 State=UNKNOWN
PartitionName=test Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:8
"""


def start_slurm(hosts: Sequence[Host], folder: Path) -> dict[str, str]:
    """Starts Slurm with a controller on the first host and one partition of all hosts; `stop_slurm` ends it.

    Args:
        hosts: hosts that run jobs, with two ranks each.
        folder: folder for Slurm's configuration and logs.

    Returns:
        Environment variables for `srun` and Slurm's other commands.
    """
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(first=hosts[0].name, names=",".join(host.name for host in hosts), folder=folder))
    environment = {"SLURM_CONF": str(config)}
    for host in hosts:
        _run(host, "mkdir -p -m 0755 /run/munge /run/slurmctld /run/slurmd")
        paths = f"--pid-file=/run/munged.pid --seed-file=/run/munge/seed --log-file={folder}/munged-{host.name}.log"
        _run(host, f"munged --force --key-file={key} --socket=/run/munge/munge.socket.2 {paths}")
    _run(hosts[0], "slurmctld", environment)
    for host in hosts:
        _run(host, "slurmd", environment)
    _wait_until_idle(hosts, environment)
    return environment


def stop_slurm(hosts: Sequence[Host]) -> None:
    """Ends Slurm and all its jobs; it can be started again on the same hosts."""
    for host in hosts:
        for pid in host.pids(r"slurm|munged"):
            with contextlib.suppress(ProcessLookupError):
                host.signal(pid, signal.SIGKILL)
        _run(host, "rm -rf /run/munge /run/slurmctld /run/slurmd /run/slurmctld.pid /run/slurmd.pid /run/munged.pid")


def _run(host: Host, line: str, environment: dict[str, str] | None = None) -> str:
    done = host.run(["bash", "-c", f"PATH=$PATH:/usr/sbin; {line}"], environment)
    assert done.returncode == 0, f"{host.name}: {line}: {done.stdout}"
    return done.stdout


def _wait_until_idle(hosts: Sequence[Host], environment: dict[str, str]) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while (
        state := hosts[0].run(["sinfo", "--noheader", "--format=%T %D"], environment).stdout
    ) != f"idle {len(hosts)}\n":
        assert time.monotonic() < deadline, f"Slurm's nodes are not ready: {state}"
        time.sleep(0.1)
