"""Launchers as users type them start a run across hosts, and it learns what one process learns."""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.training_run import TrainingRun
from tests.hosts import Host, missing_for_hosts, namespace_hosts, write_hostfile
from tests.slurm import PROGRAMS as SLURM
from tests.slurm import start_slurm
from tests.test_pretrain import losses, write

STEPS = 3
TOLERANCE = 1e-5
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    """Two hosts as Debian sets them up: their own names lead to the loopback, which is where gloo would listen."""
    with namespace_hosts(2) as hosts:
        for host in hosts:
            host.add_name(f"127.0.1.1 {host.name}")
        yield hosts


@pytest.fixture
def config(run_mapping: dict[str, Any], tmp_path: Path) -> Path:
    """A run of three steps under ZeRO-3."""
    run_mapping["beit3_ds"]["training"] |= {"total_steps": STEPS, "eval_interval": STEPS, "save_interval": STEPS}
    return write(run_mapping, tmp_path)


def needs(*programs: str) -> pytest.MarkDecorator:
    reason = missing_for_hosts(*programs)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def check_run(
    host: Host, argv: Sequence[str], mapping: dict[str, Any], folder: Path, environment: dict[str, str]
) -> str:
    """Launches a run from a host, and compares its record with that of one process; returns what it printed."""
    common = {"PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = host.run(argv, {**common, **environment}, timeout=300)
    assert done.returncode == 0, done.stdout
    alone = TrainingRun(mapping, folder / "alone")
    assert alone.finish() == [0], alone.output()
    ours, expected = losses(folder / "run"), losses(alone.output_dir)
    assert len(ours) == len(expected) >= STEPS
    for record, other in zip(ours, expected, strict=True):
        assert record.pop("kind") == other.pop("kind")
        assert record == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)  # catches ranks that do not add up
    return done.stdout


@needs("pdsh")
def test_deepspeed_with_pdsh(hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    environment = {"DS_ENV_FILE": str(tmp_path / "environment")}  # in the place of .deepspeed_env in the working folder
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    argv = ["deepspeed", "--hostfile", str(hostfile), "--module", "beit3_ds.pretrain", str(config)]
    output = check_run(hosts[0], argv, run_mapping, tmp_path, environment)
    assert all(f"\n{host.name}: " in output for host in hosts)  # pdsh says who prints: both took part


MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@pytest.mark.slow
@needs("mpirun")
def test_deepspeed_with_open_mpi(hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    hostfile = write_hostfile(tmp_path / "hostfile", hosts)
    options = ["--launcher", "openmpi", "--launcher_args", "--bind-to none", "--hostfile", str(hostfile)]
    argv = ["deepspeed", *options, "--module", "beit3_ds.pretrain", str(config)]
    check_run(hosts[0], argv, run_mapping, tmp_path, MPI_ENVIRONMENT)


@pytest.mark.slow
@needs("mpirun")
@pytest.mark.parametrize("address", ["discovered", "given"])
def test_mpirun(hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path, address: str) -> None:
    """With the address of rank 0 mpi4py is not needed, and the port can be chosen."""
    place = ["--host", ",".join(f"{host.name}:1" for host in hosts), "-n", "2", "--bind-to", "none"]
    export = [option for name in ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS") for option in ("-x", name)]
    if address == "given":
        export += ["-x", f"MASTER_ADDR={hosts[0].name}", "-x", "MASTER_PORT=29601"]
    argv = ["mpirun", *place, *export, sys.executable, "-m", "beit3_ds.pretrain", str(config)]
    check_run(hosts[0], argv, run_mapping, tmp_path, MPI_ENVIRONMENT)


@needs(*SLURM)
@pytest.mark.slow
def test_srun(hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    environment = start_slurm(hosts, tmp_path)
    argv = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "beit3_ds.pretrain", str(config)]
    check_run(hosts[0], argv, run_mapping, tmp_path, environment)
