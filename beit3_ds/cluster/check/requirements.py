"""Computes the memory, disk space and files that a run needs on its nodes, from the run's config."""

from dataclasses import dataclass

from beit3_ds.cluster.check.fault import Fault, show_bytes
from beit3_ds.cluster.hostfile import Hostfile
from beit3_ds.config import ConfigError, RunConfig, check_layout


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """Holds the GPU memory and disk space that a run needs, and whether the run can use the given number of ranks."""

    layout_fault: str | None
    """Reason why the run cannot use this number of ranks, or None. If there is a reason, the other fields are empty."""
    rank_bytes: tuple[int, ...] = ()
    """Estimated bytes of device memory of each rank (`planner.rank_memory`). If the run trains a visual tokenizer, the
    estimate leaves out activations (`planner.model_state`)."""
    checkpoint_bytes: int = 0
    """Bytes of one checkpoint in float32: weights, two moments and, if configured, an average of the weights."""

    def describe(self) -> str:
        """Formats the memory per rank and the size of a checkpoint as one line of text."""
        if self.layout_fault is not None:
            return "run: does not fit the ranks"
        smallest, largest = min(self.rank_bytes), max(self.rank_bytes)
        memory = show_bytes(largest) if smallest == largest else f"{show_bytes(smallest)} to {show_bytes(largest)}"
        checkpoint = show_bytes(self.checkpoint_bytes)
        return f"run: {memory} per rank (modelled, compared with GPUs), {checkpoint} per checkpoint"

    def faults(self) -> list[Fault]:
        """Returns one fault if the run cannot use this number of ranks, else an empty list."""
        return [] if self.layout_fault is None else [Fault("", "layout", self.layout_fault)]


def find_required_files(config: RunConfig) -> dict[str, bool]:
    """Maps each glob pattern of a run's input files to whether a matching file must exist now.

    Tokenizer files need not exist yet, because other commands may write them before the run starts.
    """
    streams = [stream for stream in config.data.streams().values() if stream.samples_per_step]
    sources = [source for stream in streams for source in (*stream.train, *stream.validation)]
    patterns = dict.fromkeys([*(s.path for s in sources), *(path for s in sources for path in s.paths())], True)
    tokenizers = [config.tokenizers.text.path] if config.data.has_texts else []
    if config.data.has_images and config.backbone is not None:
        tokenizers.append(config.tokenizers.visual.path)
    return patterns | dict.fromkeys(filter(None, tokenizers), False)


def compute_requirements(config: RunConfig, hostfile: Hostfile) -> Requirements:
    """Computes the memory and disk space that a run needs if it uses all slots of a hostfile, with one rank per slot.

    If the run cannot use this number of ranks, only `layout_fault` is set. Otherwise, the function imports torch, which
    takes seconds.

    Args:
        config: configuration of the run.
        hostfile: hosts of the run.
    """
    world_size = hostfile.world_size
    try:
        check_layout(config, world_size)
    except ConfigError as error:
        return Requirements(layout_fault=str(error))
    from beit3_ds.planner import build_rank_model, expected_workloads, model_state, rank_memory

    if config.backbone is None:
        state = model_state(config, world_size)
        rank_bytes = (state.total,) * world_size
        return Requirements(layout_fault=None, rank_bytes=rank_bytes, checkpoint_bytes=12 * state.numel)
    stage_bytes, numel = [], 0
    for stage in range(config.parallel.pipeline_parallel_size):
        rank_model = build_rank_model(config, world_size, stage)
        stage_bytes.append(rank_memory(rank_model, expected_workloads(config, rank_model.data_parallel_size)).total)
        numel += sum(p.numel() for p in rank_model.model.parameters()) * config.parallel.tensor_parallel_size
    all_coords = (config.parallel.rank_coords(rank, world_size) for rank in range(world_size))
    return Requirements(
        layout_fault=None,
        rank_bytes=tuple(stage_bytes[coords.pipeline] for coords in all_coords),
        checkpoint_bytes=(12 if config.training.ema_decay is None else 16) * numel,
    )
