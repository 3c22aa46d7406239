"""The one place where DeepSpeed is set up."""

import ctypes
import math
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from beit3_ds.config import ParallelConfig, RunConfig
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.parallel import Mesh, ModelParallelUnit, RollCall, TensorParallel, build_mesh, is_split
from beit3_ds.pipeline import seams
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.pipeline.stages import cut_layers, stage_layers
from beit3_ds.training.optimizer import allocate_moments, build_optimizer

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST_INT = 2**31 - 1


def init_process_group(parallel: ParallelConfig) -> Mesh:
    """Joins the process group that the launcher described in the environment, or makes one of a single process.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT (set by `deepspeed`), or discovers them
    through MPI. Divides the CPU cores among the machine's ranks unless OMP_NUM_THREADS is set.
    """
    _avoid_compiling_shm_comm()
    _keep_freed_memory()
    _share_cores()
    # DeepSpeed's calls into torch.distributed are renamed there; a warning a call would bury the run's own lines.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    _describe_single_process()
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=parallel.timeout_seconds))
    # DeepSpeed's engine would do this, but too late for what is put on the rank's device before there is an engine.
    get_accelerator().set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return build_mesh(parallel)


@contextmanager
def joined_ranks(parallel: ParallelConfig) -> Iterator[Mesh]:
    """Joins the process group for the time of a program, and ends the program on all ranks if one of them fails.

    An error that a user can mend leaves as it came. Any other is told to the other ranks, which end with a line that
    names this one; a rank that lost contact with another ends with a line that names that one, and so do all if a rank
    is lost or stalled (`RollCall`).
    """
    mesh = init_process_group(parallel)
    roll_call = RollCall(parallel, mesh)
    try:
        yield mesh
    except Exception as error:
        if _is_lost_contact(error):
            roll_call.announce_lost_contact(error)
        roll_call.announce_failure(error)
        roll_call.stop()
        mesh.leave()
        raise
    roll_call.stop()
    mesh.close()


def _is_lost_contact(error: Exception) -> bool:
    """Whether a collective failed because of another rank; gloo raises plain RuntimeErrors."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Gloo"))
    )


def world_size_from_environment() -> int:
    """The number of ranks that the launcher announced; 1 without a launcher."""
    for name in ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if name in os.environ:
            return int(os.environ[name])
    return 1


def rank_from_environment() -> int:
    """This process's number among the ranks that the launcher started; 0 without a launcher."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def build_model(
    config: RunConfig, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None
) -> BEiT3:
    """Builds this rank's part of the model with its initial values, in float32 and in host memory.

    The engine partitions it further over the data-parallel ranks.

    Args:
        config: of the run.
        tensor: the ranks that divide every layer; None is this process alone.
        layers: the runs of layers of this stage; None is all layers.
    """
    training = config.training
    model = BEiT3(config.model, tensor, layers, training.activation_checkpointing, training.kernels)
    initialize_parameters(model, config.model, training.seed)
    return model


def build_schedule(config: RunConfig, mesh: Mesh) -> Schedule:
    """Builds this rank's part of the model, its engine, and the schedule that runs micro-batches through it."""
    chunks = cut_layers(config)
    model = build_model(config, mesh.tensor, stage_layers(chunks, mesh.pipeline.rank, mesh.pipeline.size))
    return Schedule(build_engine(config, model, mesh), chunks, mesh)


def build_engine(config: RunConfig, model: nn.Module, mesh: Mesh) -> deepspeed.DeepSpeedEngine:
    """Wraps the model in DeepSpeed's engine with AdamW; the engine broadcasts and partitions the parameters."""
    optimizer = build_optimizer(model, config.training)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=config.engine_config(mesh.data_parallel_size),
        mpu=ModelParallelUnit(mesh),
        dist_init_required=False,
    )
    seams.adapt_engine(engine, mesh)
    adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if not engine.zero_optimization() and isinstance(adamw, torch.optim.AdamW):
        allocate_moments(adamw)  # as DeepSpeed does under ZeRO
    return engine


def apply_update(engine: deepspeed.DeepSpeedEngine, mesh: Mesh) -> float:
    """Clips the accumulated gradients, updates the parameters and clears the gradients.

    If a gradient is not finite on any rank, the update is skipped on all: weights, moments and AdamW's count of updates
    stay as they are, gradients are cleared.

    Returns:
        The gradients' global 2-norm before clipping, over all parts of the model, the same on all ranks; infinity or
        NaN if the update was skipped.
    """
    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():
        norm = float(_gradient_norm(engine.module, mesh))
        if not math.isfinite(norm):
            seams.skip_update(engine)
            return norm
        seams.clip_gradients(engine, norm)
    seams.begin_update(engine)
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm


def _gradient_norm(model: nn.Module, mesh: Mesh) -> torch.Tensor:
    """The 2-norm over all parts of the model; what tensor-parallel ranks hold alike counts once. Sends one element."""
    counted = [p.grad for p in model.parameters() if p.grad is not None and (is_split(p) or mesh.tensor.rank == 0)]
    return mesh.sum_over_model(torch.nn.utils.get_total_norm(counted).square()).sqrt()


def compute_device() -> torch.device:
    """The device that this rank trains on."""
    return torch.device(get_accelerator().current_device_name())


def _avoid_compiling_shm_comm() -> None:
    # On CPU DeepSpeed compiles this extension at the first collective: a minute, and a build lock that has been seen to
    # hang. Without it gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _keep_freed_memory() -> None:
    # Where the model is in host memory, every step allocates the same gigabytes of activations and gradients. As it is
    # set, glibc gives much of it back to the kernel when it is freed, which then zeroes the same pages again.
    libc = ctypes.CDLL(None)
    if get_accelerator().device_name() == "cpu" and hasattr(libc, "mallopt"):
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            libc.mallopt(option, _LARGEST_INT)


def _share_cores() -> None:
    # Every rank on a machine would start a thread a core, and they would wait for each other at every barrier:
    # ten times slower with two ranks on two cores.
    if "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_SIZE", os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))


def _describe_single_process() -> None:
    if "RANK" in os.environ or "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(address)
