"""Joins this process to the process group of a run, and leaves the process group at the end."""

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from beit3_ds.config import ParallelConfig
from beit3_ds.cores import count_cores
from beit3_ds.parallel import Mesh, build_mesh
from beit3_ds.runtime.keyed_store import ForgedValueError
from beit3_ds.runtime.launch_environment import Launch, discover_through_mpi, read_launch
from beit3_ds.runtime.rendezvous import Rendezvous
from beit3_ds.runtime.run_secret import read_secret
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.runtime.watchdog import STORE_SECONDS, Watchdog


def init_process_group(parallel: ParallelConfig, output_dir: str | None = None) -> Mesh:
    """Joins the process group described by the launcher's environment variables, or creates a group of one process.

    If there are several ranks, they first prove to each other that they share a secret (`read_secret`). If there is one
    rank, no port is opened. The function sets torch's environment variables (RANK, MASTER_ADDR and so on). It divides
    the host's cores among the ranks unless OMP_NUM_THREADS is set.

    Raises:
        ConfigError: if environment variables contradict each other, or if ranks do not connect to each other in time.
    """
    return _join_launched(parallel, output_dir, lambda: -math.inf)[0]


def _join_launched(
    parallel: ParallelConfig, output_dir: str | None, contended_at: Callable[[], float]
) -> tuple[Mesh, Callable[[float], dist.Store]]:
    """Joins the process group; returns the mesh, and a function that opens another connection to the store.

    The returned function takes the time limit in seconds for each request to the store. In a run with one process, the
    returned function gives the existing store in memory.

    Args:
        parallel: layout and time limits.
        output_dir: output folder, which may hold the file with the ranks' secret (`read_secret`).
        contended_at: see `Rendezvous`.
    """
    _avoid_compiling_shm_comm()
    # DeepSpeed calls functions that torch.distributed has renamed; a warning per call would bury the run's own lines.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    launch = read_launch(os.environ)
    if launch.master_addr is None:
        launch = discover_through_mpi(launch)
    os.environ.update(launch.variables())
    # DeepSpeed's engine would set the device too late: NCCL's connections and the work before the engine need it.
    get_accelerator().set_device(launch.local_rank)
    if launch.world_size == 1:
        _use_threads(count_cores())
        store = dist.HashStore()  # in memory: a single process opens no port
        return _join(parallel, launch, "fake", store), lambda _: store
    secret = read_secret(launch.secret_file, output_dir)
    with Rendezvous(launch, parallel.timeout_seconds, secret, contended_at=contended_at) as rendezvous:
        rendezvous.meet()
        _use_threads(rendezvous.num_threads)
        try:
            backend = get_accelerator().communication_backend_name()
            return _join(parallel, launch, backend, rendezvous.store), rendezvous.connect
        except RuntimeError as error:
            if not isinstance(error, ForgedValueError) and not _is_lost_contact(error):
                raise
            raise rendezvous.explain(error) from error


@contextmanager
def joined_ranks(
    parallel: ParallelConfig,
    output_dir: str | None = None,
    signals: StopSignals | None = None,
    contended_at: Callable[[], float] = lambda: -math.inf,
) -> Iterator[Mesh]:
    """Joins the process group during the `with` block. If the block fails on one rank, the program ends on all ranks.

    After such a failure, every rank prints one line that names the failed rank. All ranks also end if a rank is lost or
    stalled. A stop signal that one rank receives is forwarded to all ranks (`Watchdog`).

    Args:
        parallel: layout and time limits.
        output_dir: output folder. It holds the file with the ranks' secret, unless an environment variable sets another
            file (`read_secret`).
        signals: recorder of the stop signals that this process receives.
        contended_at: function that returns, on rank 0, the monotonic time when another command was last seen waiting
            for the output folder; -inf if never.
    """
    mesh, connect = _join_launched(parallel, output_dir, contended_at)
    watchdog = Watchdog(parallel, mesh, connect(STORE_SECONDS), signals)
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
    """Returns the device that this rank trains on."""
    return torch.device(get_accelerator().current_device_name())


def _join(parallel: ParallelConfig, launch: Launch, backend: str, store: dist.Store) -> Mesh:
    """Builds the mesh and its process groups: several for tensors on the device, and one for values in host memory.

    Args:
        parallel: layout and timeout.
        launch: rank and world size of this process, and the address of rank 0.
        backend: backend of the device groups. A single process passes "fake", whose collectives return the input
            unchanged and open no port. gloo would open one port per group.
        store: store through which the ranks find each other.
    """
    if backend != "gloo":
        # The group for host values connects few pairs of ranks, so it may connect them when needed. Device groups of
        # gloo connect all pairs now, which shows a link that is down.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    timeout = timedelta(seconds=parallel.timeout_seconds)
    device = compute_device() if backend == "nccl" else None
    dist.init_process_group(
        backend, store=store, rank=launch.rank, world_size=launch.world_size, timeout=timeout, device_id=device
    )
    deepspeed.init_distributed(verbose=False, timeout=timeout)  # uses the existing group
    return build_mesh(parallel, store)


def _is_lost_contact(error: Exception) -> bool:
    """Returns whether an error means that a collective failed because of another rank.

    This holds for torch's `DistError`, and for a RuntimeError whose message contains "gloo" or "NCCL". gloo has no
    error type of its own.
    """
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))
    )


def _avoid_compiling_shm_comm() -> None:
    # On CPU DeepSpeed would compile this extension at the first collective, which takes a minute and a build lock that
    # was seen to hang. Without it DeepSpeed uses gloo.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _use_threads(num_threads: int) -> None:
    # By default every rank starts one thread per core of the machine. Two ranks on two cores were ten times slower with
    # this default, because their threads compete and wait for each other.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads)
