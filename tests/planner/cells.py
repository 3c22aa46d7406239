"""Defines layouts whose costs are measured, and measures several layouts on one set of ranks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import INPUT_KINDS, RankCoords, RunConfig, build_run_config
from beit3_ds.planner import RankModel, Workload, build_rank_model, workload_of
from tests.batches import random_batch
from tests.run_config import small_run_mapping

# Images, pairs and texts of the micro-batches of a step, in turn: nothing is sent for a modality that is absent.
MIXES = [(1, 1, 2), (2, 0, 0), (0, 0, 3), (0, 2, 1)]

# ZeRO-3 without prefetching and reuse follows a formula that a reader can check; with DeepSpeed's defaults a replay of
# its coordinator is needed.
STRICT = {"stage3_prefetch_bucket_size": 0, "stage3_max_reuse_distance": 0}
SMALL_BUCKET = {"reduce_bucket_size": 1_000_000}  # elements; holds all gradients, and is small beside the default
FULL = {"activation_checkpointing": "full"}
SUB_LN = {"sub_layernorm": True}
DECOUPLED = {"sub_layernorm": True, "layout": "decoupled", "num_vision_language_layers": 0}
TIED = {"tie_word_embeddings": True}
PAIRS, IMAGES = {"inputs": ["pairs"]}, {"inputs": ["images"], "tie_word_embeddings": True}


class SeenTraffic(NamedTuple):
    """Holds the observed traffic of one rank in the second step."""

    coords: RankCoords
    traffic: dict[tuple[str, str], tuple[int, int]]
    """Number of calls and bytes, by axis and kind."""


class SeenMemory(NamedTuple):
    """Holds the observed memory of one rank in the second step."""

    coords: RankCoords
    states: dict[str, int]
    """Bytes by part while the last micro-batch is computed."""
    buckets: int
    """Largest number of bytes in DeepSpeed's buckets."""
    gathered: int
    """Largest number of bytes of gathered parameters under ZeRO-3, without persistent ones."""
    activations: int
    """Largest number of bytes saved by autograd."""


def cell(
    zero_stage: int,
    micro_batches: int = 2,
    *,
    zero: dict[str, int] | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    bf16: bool = False,
    wide: bool = False,
    **parallel: Any,
) -> RunConfig:
    """Returns a run of a tiny model; `wide` keeps the stream and gradient sums of a bf16 run in float32."""
    sizes = {"num_layers": 4, "num_attention_heads": 4, "drop_path_rate": 0.1}
    mapping = small_run_mapping(zero_stage, accumulation=micro_batches, **(sizes | (model or {})))
    mapping["zero_optimization"] |= SMALL_BUCKET | (zero or {})
    if bf16:
        mapping["bf16"] = {"enabled": True}
        mapping["beit3_ds"]["training"]["fp32_residual_connection"] = wide
        if wide:
            mapping["data_types"] = {"grad_accum_dtype": "fp32"}
    mapping["beit3_ds"]["parallel"] = parallel
    mapping["beit3_ds"]["training"] |= training or {}
    for kind in set(INPUT_KINDS) - set(mapping["beit3_ds"]["model"].get("inputs", INPUT_KINDS)):
        del mapping["beit3_ds"]["data"][kind]
    return build_run_config(mapping)


def micro_batches_of(config: RunConfig, data_rank: int, step: int) -> list[PackedBatch]:
    """Returns the micro-batches of one data-parallel rank in one step; ranks and steps have different ones."""
    batches = []
    for i in range(config.gradient_accumulation_steps):
        mix = zip(INPUT_KINDS, MIXES[i % len(MIXES)], strict=True)
        counts = [count if kind in config.model.inputs else 0 for kind, count in mix]
        seed = 100 * data_rank + 10 * step + i
        batches.append(random_batch(config.model, *counts, seed=seed, drop_path=drops(config)))
    return batches


def drops(config: RunConfig) -> bool:
    """Returns whether stochastic depth is on."""
    return config.model.drop_path_rate > 0


def workloads_of(config: RunConfig, data_rank: int) -> list[Workload]:
    """Returns the workloads of the second step."""
    return [workload_of(batch) for batch in micro_batches_of(config, data_rank, step=1)]


def rank_model_of(config: RunConfig, ranks: int, coords: RankCoords) -> RankModel:
    """Returns the part of the model that the rank with these coordinates holds."""

    return build_rank_model(config, ranks, coords.pipeline, coords.tensor)


def measure_traffic(configs: list[RunConfig]) -> list[SeenTraffic]:
    """Counts the traffic of every layout's second step on these ranks; see `_measure`."""
    return _measure(configs, _count_step)


def measure_memory(configs: list[RunConfig]) -> list[SeenMemory]:
    """Measures the memory of every layout's second step on these ranks; see `_measure`."""
    return _measure(configs, _weigh_step)


def _measure(configs: list[RunConfig], observe: Callable[..., Any]) -> list[Any]:
    """Runs two steps of every layout and observes the second, because the first has one-off traffic.

    ZeRO-3 compares module numbers between data-parallel ranks, and DeepSpeed numbers the modules of all engines of a
    process. So these ranks must have built equal numbers of modules before; layouts with a pipeline come last.
    """
    from beit3_ds.parallel import build_mesh
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_schedule
    from beit3_ds.training.loss import build_loss_factors

    mesh = init_process_group(configs[0].parallel)
    results = []
    for config in configs:
        if config is not configs[0]:
            mesh = build_mesh(config.parallel, mesh.store)
        schedule = build_schedule(build_task(config), mesh)
        factors = build_loss_factors(torch.full((4,), 8), build_task(config).terms, mesh.data_parallel_size)
        for step in range(2):
            seen = observe(schedule, micro_batches_of(config, mesh.data_parallel_rank, step), factors)
        results.append(seen)
        schedule.engine.destroy()
    mesh.barrier()
    return results


def _count_step(schedule: Any, batches: list[PackedBatch], factors: Tensor) -> SeenTraffic:
    from beit3_ds.training.engine import apply_update
    from tests.planner.counting import CollectiveCounter

    with CollectiveCounter(schedule.mesh) as counter:
        schedule.accumulate_gradients(batches, factors, lambda batch: batch)
        apply_update(schedule.engine, schedule.mesh)
    return SeenTraffic(schedule.mesh.coords, counter.totals())


def _weigh_step(schedule: Any, batches: list[PackedBatch], factors: Tensor) -> SeenMemory:
    from beit3_ds.training.engine import apply_update
    from tests.planner.live_memory import SavedTensors, bucket_bytes, gathered_bytes, state_bytes

    engine, states, buckets, gathered = schedule.engine, {}, 0, 0

    def prepare(batch: PackedBatch) -> PackedBatch:
        if batch is batches[-1]:
            states.update(state_bytes(schedule))
        return batch

    def look() -> None:
        nonlocal buckets, gathered
        buckets = max(buckets, bucket_bytes(engine.optimizer))
        gathered = max(gathered, gathered_bytes(engine.module))

    with SavedTensors(engine.module, look) as saved:
        schedule.accumulate_gradients(batches, factors, prepare)
    apply_update(engine, schedule.mesh)
    assert saved.live == 0, "autograd kept something beyond the step"
    return SeenMemory(schedule.mesh.coords, states, buckets, gathered, saved.peak)
