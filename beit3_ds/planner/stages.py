"""The costs of every pipeline stage, as a table to read."""

from collections.abc import Callable

from beit3_ds.config import RunConfig
from beit3_ds.pipeline.stages import cut_layers, layer_costs
from beit3_ds.planner.memory import Memory, rank_memory
from beit3_ds.planner.rank_model import RankModel, build_rank_model
from beit3_ds.planner.traffic import step_traffic
from beit3_ds.planner.workload import expected_workloads

_AXES = ("tensor", "pipeline", "data")
_DATA_KINDS = ("all-gather", "reduce-scatter", "all-reduce")


def describe_stages(config: RunConfig, world_size: int, decays: Callable[[str], bool]) -> str:
    """Formats a table with one column per stage: layers, parameters, and its first rank's modelled memory and traffic.

    Args:
        config: the run's configuration.
        world_size: number of ranks.
        decays: returns whether the optimizer decays the parameter with a name, by which it groups them.

    Raises:
        ConfigError: if the layout does not divide the ranks, or there are fewer samples than data-parallel ranks.
    """
    stages = range(config.parallel.pipeline_parallel_size)
    columns = [_stage_rows(build_rank_model(config, world_size, decays, stage)) for stage in stages]
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


def _stage_rows(holding: RankModel) -> dict[str, str]:
    config = holding.config
    loads = expected_workloads(config, holding.data_size)
    memory, traffic = rank_memory(holding, loads), step_traffic(holding, loads)
    sent = {axis: traffic.sent_bytes(axis) for axis in _AXES}
    others = traffic.sent_bytes("model") + traffic.sent_bytes("world")
    numel = sum(p.numel() for p in holding.model.parameters())
    return {
        "layers": ", ".join(_name_layers(run, config) for run in holding.runs),
        "parameters, millions": f"{numel / 1e6:,.1f}",
        **{f"memory, {part}, GiB": _gib(getattr(memory, part)) for part in Memory._fields},
        "memory, total, GiB": _gib(memory.total),
        **{f"sent a step, {axis}, GB": _gb(num_bytes) for axis, num_bytes in sent.items()},
        **{f"  of it {kind}, GB": _gb(traffic.sent_bytes("data", kind)) for kind in _DATA_KINDS},
        "sent a step, total, GB": _gb(sum(sent.values()) + others),
    }


def _name_layers(run: range, config: RunConfig) -> str:
    heads = config.model.num_pipeline_layers - 1
    blocks = range(max(run.start, 1), min(run.stop, heads))
    names = ["embeddings"] if run.start == 0 else []
    names += [f"{len(blocks)} blocks"] if blocks else []
    names += ["heads"] if run.stop > heads else []
    return "+".join(names)


def bubble_share(config: RunConfig) -> float:
    """The share of a step in which a stage of an even pipeline idles while it fills and empties.

    (S - 1) / (V m + S - 1) of S stages, m micro-batches and V runs a stage (Narayanan et al., 2021, arXiv:2104.04473,
    section 2.2).
    """
    stages, runs = config.parallel.pipeline_parallel_size, config.parallel.virtual_pipeline_parallel_size
    if stages == 1:
        return 0.0
    return (stages - 1) / (runs * config.gradient_accumulation_steps + stages - 1)


def imbalance(config: RunConfig) -> float:
    """How much longer the slowest stage works than the average one, 0 if they are even."""
    stages = config.parallel.pipeline_parallel_size
    costs, chunks = layer_costs(config), cut_layers(config)
    work = [sum(costs[layer] for run in chunks[stage::stages] for layer in run) for stage in range(stages)]
    return max(work) * stages / sum(work) - 1


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f}"
