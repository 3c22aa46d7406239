"""Tests that the variables of every launcher give the same rank."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.config import ConfigError
from beit3_ds.runtime.launch_environment import Launch, discover_through_mpi, expand_tasks, first_host, read_launch
from tests.preloaded import start_module

# Rank 5 of 6, the third on the second of two hosts, as each launcher describes it. Recorded from Slurm 22.05, Open MPI
# 5.0 and DeepSpeed 0.19; Hydra's from its documentation.
SLURM = {
    "SLURM_JOB_ID": "123",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "8",  # of the job; the step has fewer
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "node[0-1]",
    "SLURM_JOB_NODELIST": "login,node[0-1]",
    "SLURM_LAUNCH_NODE_IPADDR": "10.9.9.9",  # where srun was typed
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_SIZE": "6",
    "OMPI_COMM_WORLD_LOCAL_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
}
HYDRA = {"PMI_RANK": "5", "PMI_SIZE": "6", "MPI_LOCALRANKID": "2", "MPI_LOCALNRANKS": "3"}
TORCH = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
MASTER = {"MASTER_ADDR": "node0", "MASTER_PORT": "29500"}
ENVIRONMENTS = {
    "srun": SLURM | MASTER,
    "mpirun": OPEN_MPI | MASTER,
    "hydra": HYDRA | MASTER,
    "deepspeed": TORCH | {"LOCAL_SIZE": "3"},
    "torchrun": TORCH | {"LOCAL_WORLD_SIZE": "3"},
    # One launcher inside another's allocation.
    "deepspeed in a step of srun": TORCH | {"LOCAL_SIZE": "3"} | SLURM | {"SLURM_PROCID": "0"},
    "mpirun, whose daemons srun starts": OPEN_MPI | MASTER | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "hydra, whose daemons srun starts": HYDRA | MASTER | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
    "srun --mpi=pmi2": SLURM | MASTER | {"PMI_RANK": "5", "PMI_SIZE": "6", "PMI_FD": "11"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_all_launchers_come_to_the_same_rank(name: str) -> None:
    launch = read_launch(ENVIRONMENTS[name])
    expected = {"rank": 5, "world_size": 6, "local_rank": 2, "local_size": 3}
    assert replace(launch, launcher="") == Launch(launcher="", master_addr="node0", master_port=29500, **expected)
    read_again = read_launch(launch.variables())  # what is written for torch says the same
    assert replace(read_again, launcher="") == replace(launch, launcher="")


def test_srun_names_the_first_host_of_the_step_and_a_port_of_its_own() -> None:
    launch = read_launch(SLURM)
    assert launch.master_addr == "node0"
    ports = {read_launch(SLURM | {"SLURM_JOB_ID": str(job)}).master_port for job in range(100, 120)}
    ports |= {read_launch(SLURM | {"SLURM_STEP_ID": str(step)}).master_port for step in range(10)}
    assert len(ports) == 30
    assert all(1024 <= port < 32_768 for port in ports)  # Linux gives out higher ones to anybody


def test_mpirun_does_not_say_where_rank_0_is() -> None:
    assert read_launch(OPEN_MPI).master_addr is None
    assert "MASTER_ADDR" not in read_launch(OPEN_MPI).variables()


def test_the_address_that_mpi_finds_is_all_that_is_taken_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks that only the address is taken from DeepSpeed's MPI discovery.

    The discovery knows neither the number of ranks per host nor the devices that a rank sees.
    """
    pytest.importorskip("mpi4py")

    def discover(distributed_port: int, verbose: bool) -> None:
        monkeypatch.setenv("MASTER_ADDR", f"10.1.0.1 {distributed_port}")

    monkeypatch.setattr("deepspeed.comm.mpi_discovery", discover)
    launch = read_launch(OPEN_MPI | {"MASTER_PORT": "29700"})
    assert discover_through_mpi(launch) == replace(launch, master_addr="10.1.0.1 29700")


def test_without_mpi4py_the_address_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"mpirun \(Open MPI\) does not set rank 0's address.*-x MASTER_ADDR=HOST"):
        discover_through_mpi(read_launch(OPEN_MPI))


@pytest.mark.parametrize("environment", [SLURM, OPEN_MPI, HYDRA])
def test_a_rank_that_sees_one_device_takes_it(environment: dict[str, str]) -> None:
    """Checks a rank that sees a single device, as under `srun --gpus-per-task=1`, where device 2 does not exist."""
    assert read_launch(environment | {"CUDA_VISIBLE_DEVICES": "5"}).local_rank == 0
    assert read_launch(environment | {"CUDA_VISIBLE_DEVICES": "0,1,5"}).local_rank == 2
    assert read_launch(environment | {"CUDA_VISIBLE_DEVICES": ""}).local_rank == 2


def test_a_batch_script_is_one_process() -> None:
    """Checks that a batch script is one process and does not wait for ranks that nobody starts.

    Slurm sets SLURM_PROCID=0 and SLURM_NTASKS in batch scripts too. Several such processes in one job must not share a
    port.
    """
    batch = {name: value for name, value in SLURM.items() if "STEP" not in name} | {"SLURM_PROCID": "0"}
    interactive = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}  # a shell that srun --pty started
    for environment in ({}, batch, SLURM | interactive):
        launch = read_launch(environment)
        assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == (0, 1, 0, 1)
        assert launch.master_addr == "127.0.0.1"
        assert launch.master_port != read_launch(SLURM).master_port


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, r"RANK=0 is set, but not WORLD_SIZE, MASTER_ADDR, MASTER_PORT.*Unset RANK"),
        (TORCH | {"WORLD_SIZE": "two"}, r"WORLD_SIZE='two', but a whole number"),
        (TORCH | {"RANK": "-1"}, r"RANK='-1', but a whole number"),
        (TORCH | {"RANK": "6"}, r"rank 6 is not below the number of ranks, 6.*fresh shell"),
        (TORCH | {"RANK": "\u0663"}, r"RANK='\u0663', but a whole number"),
        (TORCH | {"WORLD_SIZE": "4000000000"}, r"number of ranks is 4000000000; it must be between 1 and"),
        (TORCH | {"WORLD_SIZE": "0", "RANK": "0"}, r"number of ranks is 0; it must be between 1 and"),
        (TORCH | {"WORLD_SIZE": ""}, r"is set, but not WORLD_SIZE\. "),
        (TORCH | {"RANK": ""}, r"RANK='', but a whole number"),
        ({name: value for name, value in TORCH.items() if name != "LOCAL_RANK"}, r"but LOCAL_RANK is not"),
        (TORCH | {"LOCAL_SIZE": "2"}, r"local rank 2 is not below the number of ranks on this host, 2"),
        (TORCH | {"MASTER_PORT": "70000"}, r"MASTER_PORT=70000 is not a port"),
        (OPEN_MPI | {"MASTER_PORT": "0"}, r"MASTER_PORT=0 is not a port"),
        ({"OMPI_COMM_WORLD_RANK": "0"}, r"OMPI_COMM_WORLD_SIZE=None"),
        ({**SLURM, "SLURM_LOCALID": ""}, r"SLURM_LOCALID='', but a whole number"),
    ],
)
def test_nonsense_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_launch(environment)


@given(
    prefix=st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z]", fullmatch=True),
    width=st.integers(1, 4),
    start=st.integers(0, 50),
    end=st.none() | st.integers(51, 99),
    suffix=st.sampled_from(["", "-ib", ".cluster"]),
    more=st.sampled_from(["", ",7", ",9-12"]),
    others=st.sampled_from(["", ",login1", ",gpu[1-2],x[3]"]),
)
def test_the_first_host_of_a_list(
    prefix: str, width: int, start: int, end: int | None, suffix: str, more: str, others: str
) -> None:
    span = f"{start:0{width}}" + (f"-{end:0{width}}" if end is not None else "")
    first = f"{prefix}{start:0{width}}{suffix}"
    assert first_host(f"{prefix}[{span}{more}]{suffix}{others}") == first
    assert first_host(f"{first}{others}") == first


@given(st.lists(st.tuples(st.integers(1, 16), st.integers(1, 40)), min_size=1))
def test_ranks_of_every_host(runs: list[tuple[int, int]]) -> None:
    text = ",".join(f"{count}(x{times})" if times > 1 else f"{count}" for count, times in runs)
    assert expand_tasks(text) == [count for count, times in runs for _ in range(times)]


def test_a_wrong_environment_is_one_line_and_status_2() -> None:
    """Catches an error message that fails itself because it reads the rank from the wrong environment."""
    process = start_module("beit3_ds.train", ["config.json"], env={"RANK": "x"}, output=subprocess.PIPE)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.search(r"^error on rank \?: launcher: RANK=x is set, but", output, re.MULTILINE), output
