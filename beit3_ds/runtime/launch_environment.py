"""Reads the environment variables that launchers set for each rank. Training processes learn their rank and rank 0's
address only from this module.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import RANKS
from beit3_ds.runtime.run_secret import SECRET_VARIABLE

TORCH_LAUNCHER = "the launcher"
"""Common name, in messages, for the launchers that set torch's variables. These are `deepspeed`, `torchrun` and `beit3
launch`."""
_DEFAULT_PORT = 29500  # default of torch and DeepSpeed
_FIRST_JOB_PORT, _NUM_JOB_PORTS = 20_000, 10_000  # below the ports that Linux assigns by itself
_STEPS_PER_JOB = 16


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Describes how the launcher started this rank, in torch's terms."""

    launcher: str
    """Name of the launcher, for messages."""
    rank: int
    """Global rank of this process."""
    world_size: int
    """Number of ranks on all hosts."""
    local_rank: int
    """Index of this rank's device among the devices that the rank sees. The index is 0 if mpirun or srun started the
    rank and `CUDA_VISIBLE_DEVICES` lists one device. Otherwise, the index equals the rank's index within its host."""
    local_size: int | None
    """Number of ranks on this host; None if the launcher does not set it."""
    master_addr: str | None
    """Name or address of rank 0's host; None if only MPI can find the address (`discover_through_mpi`)."""
    master_port: int
    """Port on which rank 0 listens."""

    secret_file: str | None = None
    """File with the secret of the ranks (BEIT3_SECRET_FILE); None means the file in the output folder."""

    def variables(self) -> dict[str, str]:
        """Returns the environment variables of torch and DeepSpeed with the values for this rank."""
        values = {
            "RANK": self.rank,
            "WORLD_SIZE": self.world_size,
            "LOCAL_RANK": self.local_rank,
            "LOCAL_SIZE": self.local_size,
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": self.master_port,
        }
        return {name: str(value) for name, value in values.items() if value is not None}


def read_launch(environment: Mapping[str, str]) -> Launch:
    """Reads how this rank was launched, from the variables of torch, MPI or Slurm, in this order of precedence.

    MPI precedes Slurm, because mpirun starts its daemons with srun. Among the variables of MPI, those of PMI are used
    only if those of Hydra exist too. Variables of Slurm are used only if srun started several tasks. Without any usable
    variables, this process is the only rank. MASTER_ADDR and MASTER_PORT override the values of MPI and Slurm.

    Raises:
        ConfigError: if variables are missing, are not numbers, or contradict each other.
    """
    if "RANK" in environment:
        launch = _read_torch(environment)
    elif "OMPI_COMM_WORLD_RANK" in environment:
        launch = _read_mpi(environment, "mpirun (Open MPI)", "OMPI_COMM_WORLD_{}")
    elif "PMI_RANK" in environment and "MPI_LOCALRANKID" in environment:
        launch = _read_hydra(environment)
    elif environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        launch = _read_slurm(environment)
    else:
        launch = _single_process()
    _check(launch)
    return replace(launch, secret_file=environment.get(SECRET_VARIABLE))


def discover_through_mpi(launch: Launch) -> Launch:
    """Finds the address of rank 0 through MPI, and returns a copy of `launch` with this address.

    The address is the first one that `hostname -I` prints on rank 0's host. MPI broadcasts the address and gathers all
    host names.

    Raises:
        ConfigError: if mpi4py is not installed.
    """
    try:
        import mpi4py  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"{launch.launcher} does not set rank 0's address, and mpi4py, which finds it, cannot be imported "
            f"({error}). Install it (pip install mpi4py), or name the first host: mpirun -x MASTER_ADDR=HOST ..."
        ) from None
    from deepspeed.comm import mpi_discovery

    mpi_discovery(distributed_port=launch.master_port, verbose=False)  # sets the environment
    return replace(launch, master_addr=os.environ["MASTER_ADDR"])


def _read_torch(environment: Mapping[str, str]) -> Launch:
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not environment.get(name)]:
        raise ConfigError(
            f"launcher: RANK={environment['RANK']} is set, but not {', '.join(missing)}. Launchers (deepspeed, "
            "torchrun) set all of them. Unset RANK to train in one process; srun and mpirun need no RANK either."
        )
    if "LOCAL_RANK" not in environment and environment["WORLD_SIZE"] != "1":
        raise ConfigError(
            f"launcher: RANK={environment['RANK']} and WORLD_SIZE={environment['WORLD_SIZE']} are set, but LOCAL_RANK "
            "is not, so all ranks of a host would take its first device. Launchers (deepspeed, torchrun) set all."
        )
    local_size = "LOCAL_SIZE" if "LOCAL_SIZE" in environment else "LOCAL_WORLD_SIZE"
    return Launch(
        launcher=TORCH_LAUNCHER,
        rank=_number(environment, "RANK"),
        world_size=_number(environment, "WORLD_SIZE"),
        local_rank=_number(environment, "LOCAL_RANK") if "LOCAL_RANK" in environment else 0,
        local_size=_number(environment, local_size) if local_size in environment else None,
        master_addr=environment["MASTER_ADDR"],
        master_port=_number(environment, "MASTER_PORT"),
    )


def _read_mpi(environment: Mapping[str, str], launcher: str, name: str) -> Launch:
    return Launch(
        launcher=launcher,
        rank=_number(environment, name.format("RANK")),
        world_size=_number(environment, name.format("SIZE")),
        local_rank=_device(environment, name.format("LOCAL_RANK")),
        local_size=_number(environment, name.format("LOCAL_SIZE")),
        master_addr=environment.get("MASTER_ADDR"),
        master_port=_port(environment, _DEFAULT_PORT),
    )


def _read_hydra(environment: Mapping[str, str]) -> Launch:
    return Launch(
        launcher="mpirun (Hydra: MPICH, Intel MPI)",
        rank=_number(environment, "PMI_RANK"),
        world_size=_number(environment, "PMI_SIZE"),
        local_rank=_device(environment, "MPI_LOCALRANKID"),
        local_size=_number(environment, "MPI_LOCALNRANKS"),
        master_addr=environment.get("MASTER_ADDR"),
        master_port=_port(environment, _DEFAULT_PORT),
    )


def _read_slurm(environment: Mapping[str, str]) -> Launch:
    tasks = expand_tasks(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = _number(environment, "SLURM_NODEID")
    # Jobs that share a host need different ports, and all ranks of a job must compute the same one.
    job, step = _number(environment, "SLURM_JOB_ID"), _number(environment, "SLURM_STEP_ID")
    port = _FIRST_JOB_PORT + (job * _STEPS_PER_JOB + step) % _NUM_JOB_PORTS
    return Launch(
        launcher="srun",
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_device(environment, "SLURM_LOCALID"),
        local_size=tasks[node] if node < len(tasks) else None,
        # Not SLURM_LAUNCH_NODE_IPADDR, which is the host where srun was called, often a login node.
        master_addr=environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
        master_port=_port(environment, port),
    )


def _single_process() -> Launch:
    return Launch(
        launcher="no launcher",
        rank=0,
        world_size=1,
        local_rank=0,
        local_size=1,
        master_addr="127.0.0.1",
        master_port=_DEFAULT_PORT,  # not used
    )


def first_host(hosts: str) -> str:
    """Returns the first host in Slurm's short form of a host list, for example "node08" for "node[08-11,20],gpu1"."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def expand_tasks(counts: str) -> list[int]:
    """Returns the number of ranks on each host from Slurm's short form, for example [8, 8, 8, 4] for "8(x3),4"."""
    found = re.findall(r"([0-9]{1,7})(?:\(x([0-9]{1,7})\))?", counts)
    return [int(count) for count, times in found for _ in range(min(int(times or 1), int(RANKS.high)))]


def _device(environment: Mapping[str, str], local_rank: str) -> int:
    # With srun --gpus-per-task=1 every rank sees only its own GPU, as number 0.
    sees_one = re.fullmatch(r"[^,]+", environment.get("CUDA_VISIBLE_DEVICES", ""))
    return 0 if sees_one else _number(environment, local_rank)


def _port(environment: Mapping[str, str], default: int) -> int:
    return _number(environment, "MASTER_PORT") if environment.get("MASTER_PORT") else default


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment.get(name)
    if value is None or not re.fullmatch("[0-9]{1,18}", value):  # \d would also match digits of other scripts
        raise ConfigError(
            f"launcher: the environment has {name}={value!r}, but a whole number is expected. The launcher (deepspeed, "
            "torchrun, mpirun or srun) sets it: do not set it by hand, or correct it."
        )
    return int(value)


def _check(launch: Launch) -> None:
    if launch.world_size not in RANKS:
        raise ConfigError(
            f"{launch.launcher}: the number of ranks is {launch.world_size}; it must be {RANKS}. Do not set WORLD_SIZE "
            "by hand, or correct it."
        )
    if launch.local_size is not None and not launch.local_rank < max(1, launch.local_size):
        raise ConfigError(
            f"{launch.launcher}: local rank {launch.local_rank} is not below the number of ranks on this host, "
            f"{launch.local_size}. Variables of two launchers may be mixed: start the run from a fresh shell."
        )
    if not launch.rank < launch.world_size:
        raise ConfigError(
            f"{launch.launcher}: rank {launch.rank} is not below the number of ranks, {launch.world_size}. Variables "
            "of two launchers may be mixed: start the run from a fresh shell."
        )
    if not 0 < launch.master_port < 2**16:
        raise ConfigError(f"launcher: MASTER_PORT={launch.master_port} is not a port. Choose one from 1024 to 65535.")
