"""Checks whether a configuration fits a number of ranks, and suggests similar layouts that fit."""

import dataclasses
import math
from collections.abc import Iterator

from beit3_ds.config.parallel import ParallelConfig
from beit3_ds.config.run import RunConfig
from beit3_ds.config.step_shares import BATCH_KEYS
from beit3_ds.config.strict import ConfigError

_SUGGESTIONS = 3


def check_layout(config: RunConfig, world_size: int) -> int:
    """Checks that a run's parallel sizes, model, micro-batches and samples per step fit `world_size` ranks.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.

    Returns:
        Number of data-parallel ranks.

    Raises:
        ConfigError: if the layout is invalid, or DeepSpeed's batch sizes contradict it. For an invalid layout, the
            message names the broken rule and similar layouts that fit `world_size` ranks.
    """
    try:
        data_parallel_size = _check(config, world_size)
    except ConfigError as error:
        raise ConfigError(f"{str(error).rstrip('.')}. {_suggest(config, world_size)}") from None
    # Checked separately, because another layout would not fix a wrong number in the file.
    config.step_shares(data_parallel_size).check_batch_keys(config.deepspeed)
    return data_parallel_size


def fits_layout(config: RunConfig, world_size: int) -> bool:
    """Returns whether `check_layout` accepts the configuration on `world_size` ranks.

    This function is faster than `check_layout`, which looks for layouts to suggest in its error message.
    """
    try:
        config.step_shares(_check(config, world_size)).check_batch_keys(config.deepspeed)
    except ConfigError:
        return False
    return True


def nearest_layouts(config: RunConfig, world_size: int) -> list[RunConfig]:
    """Returns up to three configurations with similar layouts that fit `world_size` ranks, the most similar first."""
    keys = {key: value for key, value in config.deepspeed.items() if key not in BATCH_KEYS}
    asked = dataclasses.replace(config, deepspeed=keys)
    fitting = [candidate for candidate in _candidates(asked, world_size) if fits_layout(candidate, world_size)]
    return sorted(fitting, key=lambda candidate: _distance(config, candidate, world_size))[:_SUGGESTIONS]


def _check(config: RunConfig, world_size: int) -> int:
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    if config.backbone is not None:
        config.parallel.check_model(config.backbone, config.gradient_accumulation_steps)
    config.step_shares(data_parallel_size)
    config.check_engine()
    return data_parallel_size


def _candidates(config: RunConfig, world_size: int) -> Iterator[RunConfig]:
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    virtual_sizes = sorted({1, config.parallel.virtual_pipeline_parallel_size})
    layers, heads = 1, 1  # only BEiT-3 models can be divided
    if config.backbone is not None:
        layers, heads = config.backbone.num_pipeline_layers, config.backbone.num_attention_heads
    for stages in (size for size in divisors if size <= layers):
        accumulations = {config.gradient_accumulation_steps, *(stages * 2**i for i in range(5))}
        for tensor in (size for size in divisors if size <= heads):
            for virtual in virtual_sizes if stages > 1 else [1]:
                for accumulation in accumulations:
                    parallel = dataclasses.replace(
                        config.parallel,
                        tensor_parallel_size=tensor,
                        pipeline_parallel_size=stages,
                        virtual_pipeline_parallel_size=virtual,
                    )
                    yield dataclasses.replace(config, parallel=parallel, gradient_accumulation_steps=accumulation)


def _distance(config: RunConfig, other: RunConfig, world_size: int) -> tuple[float, int]:
    """Returns how much the layout of `other` differs from the layout of `config`, as a sort key.

    The first number adds one per doubling or halving of a parallel size, and a quarter per doubling or halving of the
    number of micro-batches. One more is added if `other` divides the samples of a step unevenly, unless `other` equals
    `config`. The second number is the model-parallel size of `other`, and orders layouts that are equally similar.
    """

    def doublings(a: int, b: int) -> float:
        return abs(math.log2(a / b))

    old, new = config.parallel, other.parallel
    total = (
        doublings(old.tensor_parallel_size, new.tensor_parallel_size)
        + doublings(old.pipeline_parallel_size, new.pipeline_parallel_size)
        + doublings(old.virtual_pipeline_parallel_size, new.virtual_pipeline_parallel_size)
        + doublings(config.gradient_accumulation_steps, other.gradient_accumulation_steps) / 4
    )
    shares = other.step_shares(new.data_parallel_size(world_size))
    return total + (other != config and not shares.is_even), new.model_parallel_size


def _suggest(config: RunConfig, world_size: int) -> str:
    near = "; ".join(_describe(layout, world_size) for layout in nearest_layouts(config, world_size))
    if near:
        return f"Nearest layouts of {world_size} ranks that fit: {near}."
    return f"No layout of {world_size} ranks fits this model and step."


def _describe(config: RunConfig, world_size: int) -> str:
    parallel: ParallelConfig = config.parallel
    sizes = [
        f"tensor_parallel_size={parallel.tensor_parallel_size}",
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}",
        f"gradient_accumulation_steps={config.gradient_accumulation_steps}",
    ]
    if parallel.virtual_pipeline_parallel_size > 1:
        sizes.insert(2, f"virtual_pipeline_parallel_size={parallel.virtual_pipeline_parallel_size}")
    ranks = parallel.data_parallel_size(world_size)
    uneven = "" if config.step_shares(ranks).is_even else ", uneven shares"
    return f"{', '.join(sizes)} ({ranks} data-parallel ranks{uneven})"
