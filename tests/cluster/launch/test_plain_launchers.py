"""Tests that plain launcher commands train across hosts with the losses of a single process."""

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.training_run import TrainingRun
from tests.hosts import Host, missing_for_hosts, write_hostfile
from tests.slurm import PROGRAMS as SLURM
from tests.slurm import start_slurm, stop_slurm
from tests.test_train import losses, write

STEPS = 3
TOLERANCE = 1e-5
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}
MPI_ENVIRONMENT = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
HOSTFILES = Path(__file__).parents[3] / "hostfiles" / "README.md"


@pytest.fixture
def config(run_mapping: dict[str, Any], tmp_path: Path) -> Path:
    """Returns a run of three steps under ZeRO-3."""
    run_mapping["beit3_ds"]["parallel"] = {"timeout_seconds": 100}
    run_mapping["beit3_ds"]["training"] |= {"total_steps": STEPS, "eval_interval": STEPS, "save_interval": STEPS}
    return write(run_mapping, tmp_path)


def needs(*programs: str) -> pytest.MarkDecorator:
    reason = missing_for_hosts(*programs)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def check_run(
    hosts: Sequence[Host],
    argv: Sequence[str],
    mapping: dict[str, Any],
    folder: Path,
    environment: dict[str, str] | None = None,
) -> str:
    """Launches a run from the first host and compares its records with a single process; returns the output."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(hosts[0].run, argv, ENVIRONMENT | (environment or {}), timeout=300)
        reached = False
        while not run.done():
            reached = reached or bool(hosts[1].pids(r"beit3_ds\.train"))
            time.sleep(0.2)
    done = run.result()
    assert done.returncode == 0, done.stdout
    index = json.loads((folder / "run" / "checkpoints" / f"step-{STEPS:08d}" / "index.json").read_text())
    assert reached and index["layout"] == "2 data-parallel x 1 tensor-parallel ranks"  # else each may train alone

    alone = TrainingRun(mapping, folder / "alone")
    assert alone.finish() == [0], alone.output()
    ours, expected = losses(folder / "run"), losses(alone.output_dir)
    assert len(ours) == len(expected) >= STEPS
    for record, other in zip(ours, expected, strict=True):
        assert record.pop("kind") == other.pop("kind")
        assert record == pytest.approx(other, rel=TOLERANCE, abs=TOLERANCE)
    return done.stdout


@pytest.mark.slow
@needs(*SLURM)
def test_srun(debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    environment = start_slurm(debian_hosts, tmp_path)
    argv = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "beit3_ds.train", str(config)]
    check_run(debian_hosts, argv, run_mapping, tmp_path, environment)
    stop_slurm(debian_hosts)


@pytest.mark.slow
@needs("pdsh")
def test_deepspeed_with_pdsh(
    debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "environment").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")
    environment = {"DS_ENV_FILE": str(tmp_path / "environment")}  # in the place of .deepspeed_env in the working folder
    hostfile = write_hostfile(tmp_path / "hostfile", debian_hosts)
    argv = ["deepspeed", "--hostfile", str(hostfile), "--module", "beit3_ds.train", str(config)]
    check_run(debian_hosts, argv, run_mapping, tmp_path, environment)


@pytest.mark.slow
@needs("mpirun")
def test_deepspeed_with_open_mpi(
    debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("mpi4py")
    hostfile = write_hostfile(tmp_path / "hostfile", debian_hosts)
    options = ["--launcher", "openmpi", "--launcher_args", "--bind-to none", "--hostfile", str(hostfile)]
    argv = ["deepspeed", *options, "--module", "beit3_ds.train", str(config)]
    check_run(debian_hosts, argv, run_mapping, tmp_path, MPI_ENVIRONMENT)


@pytest.mark.slow
@needs("mpirun")
@pytest.mark.parametrize("address", ["discovered", "given"])
def test_mpirun(
    debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path, address: str
) -> None:
    """Passes the address of rank 0, so that mpi4py is not needed and any free port can be used."""
    if address == "discovered":
        pytest.importorskip("mpi4py")
    place = ["--host", ",".join(f"{host.name}:1" for host in debian_hosts), "-n", "2", "--bind-to", "none"]
    export = [option for name in ("PYTHONPATH", "DS_ACCELERATOR", "OMP_NUM_THREADS") for option in ("-x", name)]
    if address == "given":
        export += ["-x", f"MASTER_ADDR={debian_hosts[0].name}", "-x", "MASTER_PORT=29601"]
    argv = ["mpirun", *place, *export, sys.executable, "-m", "beit3_ds.train", str(config)]
    check_run(debian_hosts, argv, run_mapping, tmp_path, MPI_ENVIRONMENT)


@pytest.mark.slow
@needs()
def test_torchrun(debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Starts ranks whose store is held by torchrun's agent on the first host, not by rank 0."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={debian_hosts[0].address}:29400"]
    argv = ["torchrun", "--nnodes=2", "--nproc-per-node=1", *meeting, "-m", "beit3_ds.train", str(config)]
    with open(tmp_path / "second.log", "w") as log:
        second = debian_hosts[1].start(argv, ENVIRONMENT, stdout=log, stderr=log)
        check_run(debian_hosts, argv, run_mapping, tmp_path)
    assert second.wait(60) == 0, (tmp_path / "second.log").read_text()


def batch_script(folder: Path) -> list[str]:
    """Returns the beginning of the sbatch command for the script in hostfiles/README.md, adapted to the test hosts."""
    (text,) = re.findall(r"```bash\n(.*?)```", HOSTFILES.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "pretrain.sbatch").write_text(text)
    fitting = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    return ["sbatch", "--wait", *fitting, f"--output={folder / 'job.log'}", str(folder / "pretrain.sbatch")]


@pytest.mark.slow
@needs(*SLURM)
def test_sbatch(debian_hosts: list[Host], config: Path, run_mapping: dict[str, Any], tmp_path: Path) -> None:
    environment = start_slurm(debian_hosts, tmp_path)
    check_run(debian_hosts, [*batch_script(tmp_path), str(config)], run_mapping, tmp_path, environment)
    log = (tmp_path / "job.log").read_text()
    assert "\n0: " in log and "Traceback" not in log
    stop_slurm(debian_hosts)


@pytest.mark.slow
@needs(*SLURM)
def test_slurm_can_end_a_run_early(debian_hosts: list[Host], config: Path, tmp_path: Path) -> None:
    """Stops a run like `--signal=TERM@600`; the job must count as completed, so that dependent jobs start."""
    environment = ENVIRONMENT | start_slurm(debian_hosts, tmp_path)
    argv = [*batch_script(tmp_path), str(config), "--set", "training.total_steps=100000"]
    job = debian_hosts[0].start(argv, environment)
    deadline = time.monotonic() + 120
    log = tmp_path / "job.log"
    while not log.exists() or "step 2/" not in log.read_text():
        assert time.monotonic() < deadline and job.poll() is None, log.read_text()
        time.sleep(0.1)
    assert debian_hosts[0].run(["scancel", "--signal=TERM", "1"], environment).returncode == 0
    assert job.wait(120) == 0, log.read_text()
    assert "stopped after step" in log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))
    stop_slurm(debian_hosts)
