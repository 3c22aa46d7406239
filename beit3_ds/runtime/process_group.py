"""Joins this process to the process group of a run, and leaves it."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from beit3_ds.config import ParallelConfig
from beit3_ds.cores import count_cores
from beit3_ds.parallel import Mesh, build_mesh
from beit3_ds.runtime.launch_environment import discover_through_mpi, read_launch
from beit3_ds.runtime.rendezvous import Rendezvous
from beit3_ds.runtime.watchdog import Watchdog


def init_process_group(parallel: ParallelConfig) -> Mesh:
    """Joins the process group that the launcher described in the environment, or makes one of a single process.

    Afterwards torch's variables (RANK, MASTER_ADDR and so on) are in the environment under every launcher. Divides the
    CPU cores that the ranks of a host may use among them, unless OMP_NUM_THREADS is set.

    Raises:
        ConfigError: if the environment is contradictory, or ranks cannot reach each other or do not arrive in time.
    """
    _avoid_compiling_shm_comm()
    # DeepSpeed's calls into torch.distributed are renamed there; a warning a call would bury the run's own lines.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    launch = read_launch(os.environ)
    if launch.master_addr is None:
        launch = discover_through_mpi(launch)
    os.environ.update(launch.variables())
    # DeepSpeed's engine would set the device too late: NCCL connects it, and there is work before the engine exists.
    get_accelerator().set_device(launch.local_rank)
    if launch.world_size == 1:
        _use_threads(count_cores())
        return _join(parallel)
    with Rendezvous(launch, parallel.timeout_seconds) as rendezvous:
        rendezvous.meet()
        _use_threads(rendezvous.num_threads)
        try:
            return _join(parallel)
        except RuntimeError as error:
            if not _is_lost_contact(error):
                raise
            raise rendezvous.explain(error) from error


@contextmanager
def joined_ranks(parallel: ParallelConfig) -> Iterator[Mesh]:
    """Joins the process group for the time of a program, and ends the program on all ranks if one of them fails.

    An error that a user can mend leaves as it came. Any other is told to the other ranks, which end with a line that
    names this one; a rank that lost contact with another ends with a line that names that one, and so do all if a rank
    is lost or stalled (`Watchdog`).
    """
    mesh = init_process_group(parallel)
    watchdog = Watchdog(parallel, mesh)
    try:
        yield mesh
    except Exception as error:
        if _is_lost_contact(error):
            watchdog.announce_lost_contact(error)
        watchdog.announce_failure(error)
        watchdog.stop()
        mesh.leave()
        raise
    watchdog.stop()
    mesh.close()


def compute_device() -> torch.device:
    """The device that this rank trains on."""
    return torch.device(get_accelerator().current_device_name())


def _join(parallel: ParallelConfig) -> Mesh:
    """Builds the process groups for device tensors, which accept no other tensors, and the group for host values."""
    if get_accelerator().communication_backend_name() != "gloo":
        # The group for host values connects few pairs of ranks. If the device groups are gloo's too, they connect all
        # pairs now, which shows a link that is down.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=parallel.timeout_seconds))
    return build_mesh(parallel)


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because of another rank; gloo raises plain RuntimeErrors."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))
    )


def _avoid_compiling_shm_comm() -> None:
    # On CPU DeepSpeed compiles this extension at the first collective: a minute, and a build lock that has been seen to
    # hang. Without it gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _use_threads(number: int) -> None:
    # Every rank on a machine would start one thread per core, and they would wait for each other at every barrier:
    # ten times slower with two ranks on two cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(number)
