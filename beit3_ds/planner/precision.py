"""Models the cost of float32 for the residual stream and for gradient sums in a bf16 run."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from beit3_ds.config import RunConfig
from beit3_ds.planner.memory import rank_memory
from beit3_ds.planner.rank_model import RankModel, build_rank_model
from beit3_ds.planner.traffic import step_traffic
from beit3_ds.planner.workload import expected_workloads

BANDWIDTH = 3.35e12
"""Assumed memory bandwidth in bytes per second, from the data sheet of the H100 SXM."""

_FORWARD_PASSES = 3
"""Number of times that the forward pass of an attention or FFN reads or writes the whole residual stream. The norm
reads the stream. The residual addition at the end reads and writes the stream."""
_BACKWARD_PASSES = 4
"""Number of times that the backward pass of an attention or FFN reads or writes the whole residual stream or its
gradient. The norm's backward reads the stream and the gradient, and writes the gradient. The residual addition's
backward reads the gradient."""


class PrecisionCost(NamedTuple):
    """Holds the modelled cost of one choice of dtypes, for the rank that needs the most memory."""

    memory: int
    """Memory of the rank in bytes."""
    sent: float
    """Bytes that the rank sends per step, over all axes."""
    seconds: float
    """Seconds per step for reading and writing the residual stream and the gradient sums at full memory bandwidth."""


def describe_precision(config: RunConfig, world_size: int) -> str:
    """Formats a table that compares float32 and bf16 for the residual stream and for gradient sums.

    Returns an empty string unless the run uses bf16.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.
    """
    if not config.options.is_bf16:
        return ""
    chosen_stream = config.training.fp32_residual_connection
    chosen_sums = config.options.grad_accum_dtype == "fp32"
    lines = [f"precision, modelled, of the fullest rank; time at {BANDWIDTH / 1e12:g} TB/s"]
    for name, chosen, change in (
        ("residual stream", chosen_stream, _with_stream),
        ("sums of gradients", chosen_sums, _with_sums),
    ):
        for wide in (True, False):
            cost = precision_cost(change(config, wide), world_size)
            mark = "  (set)" if wide == chosen else ""
            dtype = "fp32" if wide else "bf16"
            lines.append(
                f"  {f'{name} in {dtype}':<26}{cost.memory / 2**30:8.2f} GiB{cost.sent / 1e9:10.2f} GB sent per step"
                f"{cost.seconds * 1e3:10.1f} ms per step{mark}"
            )
    return "\n".join(lines)


def precision_cost(config: RunConfig, world_size: int) -> PrecisionCost:
    """Returns the modelled cost of a configuration's dtypes, for the rank that needs the most memory."""
    stages = range(config.parallel.pipeline_parallel_size)
    return max(_stage_cost(build_rank_model(config, world_size, stage)) for stage in stages)


def _stage_cost(rank_model: RankModel) -> PrecisionCost:
    config = rank_model.config
    workloads = expected_workloads(config, rank_model.data_parallel_size)
    traffic = step_traffic(rank_model, workloads)
    own_rows = sum(
        workload.rows // (rank_model.tensor.size if rank_model.tensor.divides_rows else 1) for workload in workloads
    )
    branches = 2 * sum(len(rank_model.blocks_of(chunk)) for chunk in rank_model.chunks)
    recomputed = config.training.activation_checkpointing == "full"
    passes = _FORWARD_PASSES * (1 + recomputed) + _BACKWARD_PASSES
    stream = own_rows * config.model.hidden_size * rank_model.stream_size * branches * passes
    # Every micro-batch's gradients are read once and added to the sums, which are read and written.
    numel = sum(p.numel() for p in rank_model.model.parameters()) // (
        rank_model.data_parallel_size if rank_model.zero_stage >= 2 else 1
    )
    sums = len(workloads) * numel * (rank_model.element_size + 2 * rank_model.gradient_size)
    sent = sum(traffic.sent_bytes(axis) for axis in traffic.sizes)
    return PrecisionCost(rank_memory(rank_model, workloads).total, sent, (stream + sums) / BANDWIDTH)


def _with_stream(config: RunConfig, wide: bool) -> RunConfig:
    return dataclasses.replace(config, training=dataclasses.replace(config.training, fp32_residual_connection=wide))


def _with_sums(config: RunConfig, wide: bool) -> RunConfig:
    types: Mapping[str, Any] = config.deepspeed.get("data_types", {})
    changed = {**types, "grad_accum_dtype": "fp32" if wide else "bf16"}
    return dataclasses.replace(config, deepspeed={**config.deepspeed, "data_types": changed})
