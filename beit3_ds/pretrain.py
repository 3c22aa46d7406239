"""Pretrains BEiT-3: `deepspeed --module beit3_ds.pretrain CONFIG.json`, or `beit3 pretrain CONFIG.json`.

This module wires the rooms in the order in which data flows.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from beit3_ds.batch import ImageViews, StepBatch
from beit3_ds.checkpoint import CheckpointStore
from beit3_ds.config import Place, RunConfig
from beit3_ds.data import StepDataset, build_heldout_batches, build_train_loader
from beit3_ds.parallel import Shared
from beit3_ds.rank_program import run_rank_program
from beit3_ds.tokenizers import TextTokenizer, VisualTokenizer, check_visual_tokenizer_fits, load_visual_tokenizer
from beit3_ds.tokenizers.text import load_text_tokenizer
from beit3_ds.training.engine import (
    build_schedule,
    compute_device,
    init_process_group,
    rank_from_environment,
    world_size_from_environment,
)
from beit3_ds.training.flops import peak_flops
from beit3_ds.training.history import History
from beit3_ds.training.loop import Run, resume, train
from beit3_ds.training.progress import Progress
from beit3_ds.training.report import write_report


def pretrain(config: RunConfig) -> None:
    """Trains a run to its end, going on from its newest whole checkpoint if there is one, and writes its report.

    Raises:
        ConfigError: for a configuration, tokenizer, data file or checkpoint that cannot work.
        NonFiniteLossError: if training diverges.
    """
    text_tokenizer = load_text_tokenizer(config)
    run, steps = build_run(config, text_tokenizer)
    train(run, steps)
    write_report(run, text_tokenizer)
    run.mesh.close()


def build_run(config: RunConfig, text_tokenizer: TextTokenizer) -> tuple[Run, Iterable[StepBatch]]:
    """Builds all parts of a run and resumes it; returns them with this rank's steps that are left.

    All that can be checked on one process is checked before a process group exists.

    Raises:
        ConfigError: as `pretrain`.
    """
    world_size = world_size_from_environment()
    data_parallel_size = config.parallel.data_parallel_size(world_size)
    place = config.parallel.place(rank_from_environment(), world_size)
    config.micro_batch_size(data_parallel_size)
    has_heads = place.pipeline == config.parallel.pipeline_parallel_size - 1
    visual_tokenizer = _load_visual_tokenizer(config) if has_heads else None
    share = (config, text_tokenizer, place.data, data_parallel_size, _views(place, has_heads))
    reads = place.tensor == 0 and (place.pipeline == 0 or has_heads)
    dataset, heldout = (StepDataset(*share), build_heldout_batches(*share)) if reads else (None, ())

    mesh = init_process_group(config.parallel)
    assert mesh.place == place and mesh.is_reader == reads, "the mesh gives this rank another place"
    device = compute_device()
    schedule = build_schedule(config, mesh)
    output = Path(config.training.output_dir)
    store = CheckpointStore(output / "checkpoints", config.training.keep_checkpoints, mesh)
    history = History(output / "metrics.jsonl")
    first_step = resume(schedule.engine, store, history, mesh)
    dtype = next(schedule.engine.module.parameters()).dtype
    run = Run(
        config=config,
        schedule=schedule,
        mesh=mesh,
        device=device,
        visual_tokenizer=visual_tokenizer.to(device) if visual_tokenizer else None,
        heldout=Shared(heldout, mesh),
        store=store,
        history=history,
        progress=Progress(config.model, config.training.total_steps, peak_flops(device, dtype), mesh),
        first_step=first_step,
    )
    return run, Shared(build_train_loader(dataset, config.data, first_step) if dataset else (), mesh)


def _load_visual_tokenizer(config: RunConfig) -> VisualTokenizer:
    visual_tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
    check_visual_tokenizer_fits(visual_tokenizer, config)
    return visual_tokenizer


def _views(place: Place, has_heads: bool) -> ImageViews:
    if has_heads:
        return "both" if place.pipeline == 0 else "tokenizer"
    return "model"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 after one clear line about what the user can mend."""
    return run_rank_program(pretrain, "beit3_ds.pretrain", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
