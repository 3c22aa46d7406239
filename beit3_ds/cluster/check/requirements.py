"""What one run needs of its nodes, worked out from its config."""

from collections.abc import Callable
from dataclasses import dataclass

from beit3_ds.cluster.check.fault import Fault, show_bytes
from beit3_ds.cluster.hostfile import Hostfile
from beit3_ds.config import ConfigError, RunConfig, check_layout


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Of a run, on the ranks that a hostfile gives."""

    layout_fault: str | None
    """Why the run does not fit the number of ranks; the rest is then empty."""
    rank_bytes: tuple[int, ...] = ()
    """Memory of each rank, modelled (`planner.rank_memory`)."""
    checkpoint_bytes: int = 0
    """Size of one checkpoint: weights and two moments in float32."""

    def describe(self) -> str:
        """Sizes for people; whether GPUs and disks hold them is among the faults, if there are GPUs."""
        if self.layout_fault is not None:
            return "run: does not fit the ranks"
        smallest, largest = min(self.rank_bytes), max(self.rank_bytes)
        memory = show_bytes(largest) if smallest == largest else f"{show_bytes(smallest)} to {show_bytes(largest)}"
        return f"run: {memory} a rank (modelled, compared with GPUs), {show_bytes(self.checkpoint_bytes)} a checkpoint"

    def faults(self) -> list[Fault]:
        """That the run does not fit the ranks, if so; that it does not fit a host is found with the host's faults."""
        return [] if self.layout_fault is None else [Fault("", "layout", self.layout_fault)]


def named_files(config: RunConfig) -> dict[str, bool]:
    """Glob patterns of what a run reads, and whether it is there before the first command: tokenizers are trained."""
    streams = [stream for stream in config.data.streams().values() if stream.samples_per_step]
    sources = [source for stream in streams for source in (*stream.train, *stream.validation)]
    patterns = dict.fromkeys([*(s.path for s in sources), *(s.images for s in sources if s.images)], True)
    tokenizers = [config.tokenizers.text.path] if config.data.has_texts else []
    tokenizers += [config.tokenizers.visual.path] if config.data.has_images else []
    return patterns | dict.fromkeys(tokenizers, False)


def work_out_requirements(config: RunConfig, hostfile: Hostfile, decays: Callable[[str], bool]) -> Requirements:
    """Returns what a run needs on all slots of a hostfile; imports torch, which takes seconds, if the layout fits.

    Args:
        config: of the run.
        hostfile: whose slots are its ranks.
        decays: whether the optimizer decays the parameter of a name, which is how it groups them.
    """
    world_size = hostfile.world_size
    try:
        check_layout(config, world_size)
    except ConfigError as error:
        return Requirements(layout_fault=str(error))
    from beit3_ds.planner import build_rank_model, expected_workloads, rank_memory

    stage_bytes, numel = [], 0
    for stage in range(config.parallel.pipeline_parallel_size):
        rank_model = build_rank_model(config, world_size, decays, stage)
        stage_bytes.append(rank_memory(rank_model, expected_workloads(config, rank_model.data_parallel_size)).total)
        numel += sum(p.numel() for p in rank_model.model.parameters()) * config.parallel.tensor_parallel_size
    all_coords = (config.parallel.rank_coords(rank, world_size) for rank in range(world_size))
    return Requirements(
        layout_fault=None,
        rank_bytes=tuple(stage_bytes[coords.pipeline] for coords in all_coords),
        checkpoint_bytes=12 * numel,
    )
