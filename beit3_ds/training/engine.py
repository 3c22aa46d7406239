"""The one place where DeepSpeed is set up."""

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from beit3_ds.config import ParallelConfig, RunConfig
from beit3_ds.cores import count_cores
from beit3_ds.kernels.cpu.host_memory import keep_freed_memory
from beit3_ds.model import BEiT3, initialize_parameters
from beit3_ds.parallel import Mesh, ModelParallelUnit, TensorParallel, build_mesh, is_split
from beit3_ds.pipeline import deepspeed_compat as seams
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.pipeline.stages import cut_layers, stage_layers
from beit3_ds.runtime.launch_environment import discover_through_mpi, read_launch
from beit3_ds.runtime.rendezvous import Rendezvous
from beit3_ds.runtime.watchdog import RollCall
from beit3_ds.training.optimizer import allocate_moments, build_optimizer


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


def _join(parallel: ParallelConfig) -> Mesh:
    """Builds the process groups for device tensors, which accept no other tensors, and the group for host values."""
    if get_accelerator().communication_backend_name() != "gloo":
        # The group for host values connects few pairs of ranks. If the device groups are gloo's too, they connect all
        # pairs now, which shows a link that is down.
        os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    deepspeed.init_distributed(verbose=False, timeout=timedelta(seconds=parallel.timeout_seconds))
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
    model = BEiT3(
        config.model,
        tensor,
        layers,
        training.activation_checkpointing,
        training.kernels,
        fp32_residual_connection=training.fp32_residual_connection,
    )
    initialize_parameters(model, config.model, training.seed)
    return model


def build_schedule(config: RunConfig, mesh: Mesh) -> Schedule:
    """Builds this rank's part of the model, its engine, and the schedule that runs micro-batches through it."""
    chunks = cut_layers(config)
    model = build_model(config, mesh.tensor, stage_layers(chunks, mesh.pipeline.rank, mesh.pipeline.size))
    return Schedule(build_engine(config, model, mesh), chunks, mesh)


def build_engine(config: RunConfig, model: nn.Module, mesh: Mesh) -> deepspeed.DeepSpeedEngine:
    """Wraps the model in DeepSpeed's engine with AdamW; the engine broadcasts and partitions the parameters."""
    keep_freed_memory(compute_device(), lasting=_gradient_bytes(config, model))
    optimizer = build_optimizer(model, config.training)
    with seams.zero1_adds_up_in_float32():
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


def _gradient_bytes(config: RunConfig, model: nn.Module) -> int:
    """Of the gradients that wait for the update as the backward pass made them: ZeRO's stages reduce them before."""
    if config.deepspeed.get("zero_optimization", {}).get("stage", 0):
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


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
    norm = torch.nn.utils.get_total_norm(counted).to(compute_device())  # without gradients it is on the CPU
    return mesh.sum_over_model(norm.square()).sqrt()


def compute_device() -> torch.device:
    """The device that this rank trains on."""
    return torch.device(get_accelerator().current_device_name())


def _avoid_compiling_shm_comm() -> None:
    # On CPU DeepSpeed compiles this extension at the first collective: a minute, and a build lock that has been seen to
    # hang. Without it gloo does the work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _use_threads(number: int) -> None:
    # Every rank on a machine would start one thread per core, and they would wait for each other at every barrier:
    # ten times slower with two ranks on two cores.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(number)
