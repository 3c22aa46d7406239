"""Builds DeepSpeed's engine and applies updates. No other module calls `deepspeed.initialize`."""

import functools
import math
from collections.abc import Sequence

import deepspeed
import torch
from torch import nn

from beit3_ds.config import RunConfig
from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.measured_op import use_backend
from beit3_ds.model import StageModel
from beit3_ds.parallel import Mesh, ModelParallelUnit, TensorParallel, is_split
from beit3_ds.pipeline import deepspeed_compat
from beit3_ds.pipeline.host_norm import keep_norm_on_host
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.pipeline.stages import cut_layers, stage_layers
from beit3_ds.runtime.process_group import compute_device
from beit3_ds.tasks import Task
from beit3_ds.training.monitor import RunMonitor
from beit3_ds.training.optimizer import allocate_moments, build_optimizer, freeze_parameters


def build_model(task: Task, tensor: TensorParallel | None = None, layers: Sequence[range] | None = None) -> StageModel:
    """Builds this rank's part of the model with initial values, in float32 and in host memory.

    Under ZeRO-3, the engine then partitions this part over the data-parallel ranks.

    Args:
        task: the run's task.
        tensor: the tensor-parallel group; None for a single process.
        layers: layers of this pipeline stage, as one range per model chunk; None builds all layers.
    """
    model = task.build_model(tensor, layers)
    model.initialize(task.config.training.seed)
    return model


def build_schedule(task: Task, mesh: Mesh, *, trains: bool = True) -> Schedule:
    """Builds this rank's part of the model, its DeepSpeed engine, and the schedule that runs micro-batches.

    Args:
        task: the run's task.
        mesh: mesh of all ranks.
        trains: whether the engine will update parameters. An engine for evaluation needs no memory for gradients and
            moments.
    """
    chunks = cut_layers(task.config, task.expected_head_flops()) if task.has_backbone else [range(1)]
    model = build_model(task, mesh.tensor, stage_layers(chunks, mesh.pipeline.rank, mesh.pipeline.size))
    engine = build_engine(task.config, model, mesh, trains=trains)
    schedule = Schedule(engine, chunks, mesh, task.step_loss)
    freeze_parameters(model, task.config)  # after the schedule's own hooks on the tied word table
    return schedule


def build_engine(config: RunConfig, model: nn.Module, mesh: Mesh, *, trains: bool = True) -> deepspeed.DeepSpeedEngine:
    """Wraps a model and AdamW in DeepSpeed's engine, which broadcasts and (under ZeRO-3) partitions the parameters.

    Also sets `training.kernel_backend` for the whole process. Without ZeRO, this function allocates the moments of
    PyTorch's AdamW. With ZeRO or Apex, the first update allocates the moments.

    Args:
        config: the run's configuration.
        model: this rank's part of the model.
        mesh: mesh of all ranks.
        trains: whether the engine will update parameters. An engine for evaluation has no moments.
    """
    use_backend(config.training.kernel_backend)
    gradient_bytes = _gradient_bytes(config, model) if trains else 0
    optimizer = build_optimizer(model, config, lambda number: max(mesh.pipeline.host.gather(number)))
    deepspeed_compat.gather_blocks_whole(model)
    with deepspeed_compat.zero1_adds_up_in_float32():
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=config.engine_config(mesh.data_parallel_size),
            mpu=ModelParallelUnit(mesh),
            dist_init_required=False,
        )
    deepspeed_compat.adapt_engine(engine, mesh)
    keep_norm_on_host(engine)
    engine.monitor = RunMonitor(engine.monitor, functools.partial(print, flush=True))
    adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if trains and not engine.zero_optimization() and isinstance(adamw, torch.optim.AdamW):
        allocate_moments(adamw)
    # Comes after `deepspeed.initialize`: before it, the process would keep the memory that DeepSpeed then frees.
    ALLOCATOR.keep_freed_memory(compute_device(), lasting=gradient_bytes)
    return engine


def _gradient_bytes(config: RunConfig, model: nn.Module) -> int:
    """Returns the bytes of the gradients that stay allocated until the update; 0 under ZeRO."""
    if config.options.zero_stage:
        return 0
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def apply_update(engine: deepspeed.DeepSpeedEngine, mesh: Mesh) -> float:
    """Clips the accumulated gradients, updates the parameters, and clears the gradients.

    If a rank has a gradient that is not finite, all ranks skip the update and clear the gradients. Weights, moments
    and AdamW's step count then stay unchanged.

    Returns:
        2-norm of the gradients of the whole model before clipping, equal on all ranks. Infinity or NaN if the update
        was skipped.
    """
    norm = None
    if not engine.zero_optimization() and not engine.bfloat16_enabled():
        norm = float(_gradient_norm(engine.module, mesh))
        if not math.isfinite(norm):
            deepspeed_compat.skip_update(engine)
            return norm
        deepspeed_compat.clip_gradients(engine, norm)
    deepspeed_compat.begin_update(engine)
    engine.step()
    return float(engine.get_global_grad_norm()) if norm is None else norm


def _gradient_norm(model: nn.Module, mesh: Mesh) -> torch.Tensor:
    """Returns the 2-norm of the gradients of the whole model, counting replicated parameters once. All-reduces one
    element.
    """
    counted = [p.grad for p in model.parameters() if p.grad is not None and (is_split(p) or mesh.tensor.rank == 0)]
    norm = torch.nn.utils.get_total_norm(counted).to(compute_device())  # on the CPU if there are no gradients
    return mesh.sum_over_model(norm.square()).sqrt()
