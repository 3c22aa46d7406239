"""Describes what a configuration would train and what it would cost, without reading data or starting processes."""

from collections.abc import Collection
from pathlib import Path

import torch

from beit3_ds.config import RunConfig, SampleCounts, StepShares, check_layout
from beit3_ds.config.deepspeed_keys import unused_keys
from beit3_ds.model.parameter_groups import check_frozen, parameter_group
from beit3_ds.planner import (
    NodeSize,
    check_node,
    describe_host,
    describe_precision,
    describe_stages,
    host_requirements,
    model_state,
)
from beit3_ds.tasks import build_task
from beit3_ds.training.best_checkpoint import is_higher_better
from beit3_ds.training.start_checks import check_output_dir, check_software

_RANKS_PER_NODE = 8  # GPUs of a typical node


def describe_dry_run(
    config: RunConfig,
    world_size: int,
    ranks_per_node: int | None = None,
    node: NodeSize | None = None,
    step_seconds: float = 1.0,
) -> str:
    """Checks a configuration for `world_size` ranks, and returns a description of the run.

    The model is built on the meta device. The description ends with modelled tables:

    * memory and traffic of each pipeline stage (`planner.describe_stages`)
    * comparison of float32 and bf16, only in a bf16 run (`planner.describe_precision`)
    * what a node needs besides GPUs (`planner.describe_host`)

    For a task without BEiT-3, there is one table instead of the first two: the memory of a rank's training state
    (`planner.model_state`).

    Args:
        config: the run's configuration.
        world_size: total number of ranks.
        ranks_per_node: number of ranks per node; None uses 8, or `world_size` if it is smaller.
        node: memory of a node; None skips the memory check.
        step_seconds: assumed time per step in seconds, from which rates are computed.

    Raises:
        ConfigError: if the layout is invalid (`check_layout`), `training.best_metric` or `training.frozen` does not fit
            the task, a package is not installed, the output folder cannot be written, or a node has too little memory.
    """
    data_parallel_size = check_layout(config, world_size)
    check_software(config)
    check_output_dir(Path(config.training.output_dir))
    is_higher_better(build_task(config))
    shares = config.step_shares(data_parallel_size)
    task = build_task(config)
    with torch.device("meta"):
        model = task.build_model()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    backbone = sum(size for name, size in sizes.items() if not name.startswith("heads."))
    total = sum(sizes.values())
    check_frozen(config.training.frozen, list(sizes))
    decayed = sum(size for name, size in sizes.items() if parameter_group(name, config).weight_decay)
    own = f", of which backbone {backbone / 1e6:,.1f}M" if task.has_backbone else ""
    training = config.training
    stage = config.options.zero_stage
    rows = {
        "parameters": f"{total / 1e6:,.1f}M{own}; {decayed / total:.1%} decay",
        "model": task.describe_architecture(),
        "ranks": f"{world_size} = {data_parallel_size} data x {config.parallel.tensor_parallel_size} tensor x "
        f"{config.parallel.pipeline_parallel_size} pipeline, ZeRO-{stage}, {config.options.precision}",
        "step": f"{config.samples_per_step} samples: "
        + ", ".join(f"{stream.samples_per_step} {name}" for name, stream in config.data.streams().items()),
        "micro-batch": _describe_shares(shares),
        "schedule": f"{training.total_steps:,} steps, {training.warmup_steps:,} warmup, lr {training.learning_rate:g}",
        "output": training.output_dir,
    }
    if idle := unused_keys(config.deepspeed):
        rows["no effect"] = f"in ZeRO stage {stage}: {', '.join(idle)}"
    lines = [f"{name:<12} {value}" for name, value in rows.items()]
    ranks_per_node = min(ranks_per_node or _RANKS_PER_NODE, world_size)
    requirements = host_requirements(config, world_size, ranks_per_node)
    check_node(requirements, config, node or NodeSize())
    tables = [model_state(config, world_size).describe()]
    if task.has_backbone:
        tables = [describe_stages(config, world_size), describe_precision(config, world_size)]
    tables.append(describe_host(config, requirements, ranks_per_node, step_seconds))
    return "\n".join([*lines, "", "\n\n".join(table for table in tables if table)])


def _describe_shares(shares: StepShares) -> str:
    """Describes the sizes of micro-batches as text.

    If the sizes differ, the text also contains the number of samples per rank, and the percentage of time that ranks
    wait for the rank with the most samples.
    """
    per_rank = {shares.rank_samples(rank) for rank in range(shares.num_ranks)}
    sizes = [size for samples in per_rank for size in shares.divide_rank(samples)]
    counts = zip(SampleCounts._fields, zip(*sizes, strict=True), strict=True)
    streams = ", ".join(f"{_span(values)} {name}" for name, values in counts)
    total = _span([sum(size) for size in sizes])
    text = f"{total} samples per data-parallel rank: {streams}; {shares.num_micro_batches} per step"
    if shares.is_even:
        return text
    waiting = 1 - sum(shares.samples) / (shares.num_ranks * shares.most_rank_samples)
    return (
        f"{text}. Uneven: {shares.fewest_rank_samples} or {shares.most_rank_samples} samples per rank and step, "
        f"{waiting:.1%} of the ranks' time waits for the largest"
    )


def _span(counts: Collection[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
