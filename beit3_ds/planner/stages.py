"""Formats the modelled cost of each pipeline stage as a table."""

from beit3_ds.config import RunConfig
from beit3_ds.pipeline.stages import cut_layers, layer_costs
from beit3_ds.planner.memory import Memory, rank_memory
from beit3_ds.planner.rank_model import RankModel, build_rank_model
from beit3_ds.planner.traffic import step_traffic
from beit3_ds.planner.workload import expected_workloads
from beit3_ds.tasks import build_task

_AXES = ("tensor", "pipeline", "data")
_DATA_KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def describe_stages(config: RunConfig, world_size: int) -> str:
    """Formats a table with the layers, parameters, modelled memory and modelled traffic of each stage.

    Memory and traffic are those of the stage's first rank.

    Args:
        config: the run's configuration.
        world_size: total number of ranks.

    Raises:
        ConfigError: if the parallel sizes do not divide the ranks, or there are fewer samples than data-parallel ranks.
    """
    stages = range(config.parallel.pipeline_parallel_size)
    columns = [_stage_rows(build_rank_model(config, world_size, stage)) for stage in stages]
    rows = [("modelled, of one rank", [f"stage {stage}" for stage in stages])]
    rows += [(name, [column[name] for column in columns]) for name in columns[0]]
    wide = max(len(name) for name, _ in rows)
    widths = [max(len(values[stage]) for _, values in rows) for stage in stages]
    lines = [
        name.ljust(wide) + "".join(f"  {value:>{width}}" for value, width in zip(values, widths, strict=True))
        for name, values in rows
    ]
    lines.append(
        f"pipeline bubble {bubble_share(config):.1%} of a step; slowest stage {imbalance(config):.1%} over average"
    )
    return "\n".join(lines)


def _stage_rows(rank_model: RankModel) -> dict[str, str]:
    config = rank_model.config
    workloads = expected_workloads(config, rank_model.data_parallel_size)
    memory, traffic = rank_memory(rank_model, workloads), step_traffic(rank_model, workloads)
    sent = {axis: traffic.sent_bytes(axis) for axis in _AXES}
    others = traffic.sent_bytes("model") + traffic.sent_bytes("world")
    numel = sum(p.numel() for p in rank_model.model.parameters())
    return {
        "layers": ", ".join(_name_layers(chunk, config) for chunk in rank_model.chunks),
        "parameters, millions": f"{numel / 1e6:,.1f}",
        **{f"memory, {part}, GiB": _gib(getattr(memory, part)) for part in Memory._fields},
        "memory, total, GiB": _gib(memory.total),
        **{f"sent per step, {axis}, GB": _gb(num_bytes) for axis, num_bytes in sent.items()},
        **{f"  of it {kind}, GB": _gb(traffic.sent_bytes("data", kind)) for kind in _DATA_KINDS},
        "sent per step, total, GB": _gb(sum(sent.values()) + others),
    }


def _name_layers(chunk: range, config: RunConfig) -> str:
    heads = config.model.num_pipeline_layers - 1
    blocks = range(max(chunk.start, 1), min(chunk.stop, heads))
    names = ["embeddings"] if chunk.start == 0 else []
    names += [f"{len(blocks)} blocks"] if blocks else []
    names += ["heads"] if chunk.stop > heads else []
    return "+".join(names)


def bubble_share(config: RunConfig) -> float:
    """Returns the fraction of a step in which stages of equal cost idle while the pipeline fills and drains.

    The fraction is (S - 1) / (V m + S - 1) with S stages, m micro-batches and V model chunks per stage (Narayanan et
    al., 2021, arXiv:2104.04473, section 2.2).
    """
    stages, stage_chunks = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return 0.0
    return (stages - 1) / (stage_chunks * config.gradient_accumulation_steps + stages - 1)


def imbalance(config: RunConfig) -> float:
    """Returns the relative excess of the slowest stage's work over the average, such as 0.1 for 10 % more."""
    stages = config.parallel.pipeline_parallel_size
    head_flops = build_task(config).expected_head_flops()
    costs, chunks = layer_costs(config, head_flops), cut_layers(config, head_flops)
    work = [sum(costs[layer] for chunk in chunks[stage::stages] for layer in chunk) for stage in range(stages)]
    return max(work) * stages / sum(work) - 1


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
