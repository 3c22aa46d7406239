"""Pretrains BEiT-3: `deepspeed --module beit3_ds.pretrain CONFIG.json`, or `beit3 pretrain CONFIG.json`.

This module wires the rooms in the order in which data flows.
"""

import functools
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from beit3_ds.batch import ImageViews, PackedBatch, StepBatch
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import is_checkpoint
from beit3_ds.checkpoint.run_description import build_run_description
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.config import RankCoords, RunConfig, check_layout
from beit3_ds.data import StepDataset, ValidationBatches, WaitLimits, build_train_loader, build_validation_batches
from beit3_ds.data.files.fingerprint import HasFiles
from beit3_ds.data.samples import name_sources
from beit3_ds.data.skipped_report import describe_skipped
from beit3_ds.data.validation_overlap import check_validation_apart
from beit3_ds.parallel import BroadcastBatches, Mesh
from beit3_ds.planner import check_node, host_requirements
from beit3_ds.rank_program import run_rank_program
from beit3_ds.runtime.launch_environment import Launch, read_launch
from beit3_ds.runtime.node_size import measure_node
from beit3_ds.runtime.process_group import compute_device, joined_ranks
from beit3_ds.runtime.startup_watchdog import watched_start
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.tokenizers import TextTokenizer, VisualTokenizer, check_visual_tokenizer_fits, load_visual_tokenizer
from beit3_ds.tokenizers.text import load_text_tokenizer
from beit3_ds.training.agreement import check_same_files, check_same_sources
from beit3_ds.training.broken_records import BrokenRecords, records_from
from beit3_ds.training.engine import build_schedule
from beit3_ds.training.flops import peak_flops
from beit3_ds.training.init_from import InitialWeights, open_initial_weights
from beit3_ds.training.loop import Run, resume, train
from beit3_ds.training.metrics_log import MetricsLog
from beit3_ds.training.optimizer import decays
from beit3_ds.training.progress import Progress
from beit3_ds.training.report import write_report
from beit3_ds.training.start_checks import check_device, check_software, prepare_output_dir
from beit3_ds.training.startup_summary import describe_startup
from beit3_ds.training.stragglers import Stragglers, TimedSteps


def pretrain(config: RunConfig) -> None:
    """Trains a run to its end, going on from its newest whole checkpoint if there is one, and writes its report.

    SIGTERM, SIGINT or SIGUSR1 ends it early, with a checkpoint and without a report (`training.loop.train`).

    Raises:
        ConfigError: for a configuration, tokenizer, data file or checkpoint that cannot work.
        NonFiniteLossError: if training diverges.
    """
    with (
        StopSignals().handling() as signals,
        watched_start(read_launch(os.environ).rank, signals.received, config.data.timeout_seconds) as start,
    ):
        inputs = open_inputs(config)
        start.end_opening()
        with joined_ranks(config.parallel) as mesh:
            run, steps = build_run(config, inputs, mesh, signals)
            start.stop()
            if train(run, steps, signals):
                write_report(run, inputs.text_tokenizer)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Inputs that this rank reads; all checks that one process can make are made before a process group exists."""

    coords: RankCoords
    """Coordinates of this rank on the mesh."""
    text_tokenizer: TextTokenizer | None
    """Text tokenizer; None in a run without texts and pairs."""
    visual_tokenizer: VisualTokenizer | None
    """Visual tokenizer; None on pipeline stages without heads, and in a run without images and pairs."""
    dataset: StepDataset | None
    """Training steps; None on ranks that receive their samples from others (`Mesh.is_reader`)."""
    validation: ValidationBatches | None
    """Validation batches; None on ranks that do not read them."""
    sources: Mapping[str, HasFiles]
    """Samples of every source that this rank reads, by its name in the config."""
    init_from: InitialWeights | None
    """What a run begins with that has no checkpoint; None is initial values drawn from the seed."""


def open_inputs(config: RunConfig) -> Inputs:
    """Checks the layout and opens the files that this rank reads.

    Raises:
        ConfigError: for a layout that does not fit, a machine with too little memory for its ranks, an optimizer that
            is not installed, kernels that are not built, an output folder that cannot be written, or a file that cannot
            be read or does not fit the model.
    """
    launch = read_launch(os.environ)
    data_parallel_size = check_layout(config, launch.world_size)
    _check_this_node(config, launch)
    check_software(config)
    check_device(config.training)
    prepare_output_dir(Path(config.training.output_dir))
    coords = config.parallel.rank_coords(launch.rank, launch.world_size)
    has_heads = coords.pipeline == config.parallel.pipeline_parallel_size - 1
    text_tokenizer = load_text_tokenizer(config)
    visual_tokenizer: VisualTokenizer | None = None
    if has_heads and config.data.has_images:
        visual_tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
        check_visual_tokenizer_fits(visual_tokenizer, config)
    has_begun = is_checkpoint(Path(config.training.output_dir))  # then the weights may be gone
    init_from = None if has_begun else open_initial_weights(config)
    dataset: StepDataset | None = None
    validation: ValidationBatches | None = None
    sources: dict[str, HasFiles] = {}
    if coords.tensor == 0 and (coords.pipeline == 0 or has_heads):
        check_validation_apart(config.data)
        views: ImageViews = "model" if not has_heads else "both" if coords.pipeline == 0 else "tokenizer"
        dataset = StepDataset(config, text_tokenizer, coords.data, data_parallel_size, views)
        validation = build_validation_batches(config, text_tokenizer, coords.data, data_parallel_size, views)
        sources = dataset.sources() | name_sources("validation", validation.streams, config.data)
        if launch.rank == 0:
            for line in describe_skipped(sources):
                print(line, flush=True)
    return Inputs(
        coords=coords,
        text_tokenizer=text_tokenizer,
        visual_tokenizer=visual_tokenizer,
        dataset=dataset,
        validation=validation,
        sources=sources,
        init_from=init_from,
    )


def _check_this_node(config: RunConfig, launch: Launch) -> None:
    """Compares this machine's memory with the needs of its ranks, if the launcher tells their number."""
    ranks_here = 1 if launch.world_size == 1 else launch.local_size
    if ranks_here:
        check_node(host_requirements(config, launch.world_size, ranks_here, decays), config, measure_node())


def build_run(config: RunConfig, inputs: Inputs, mesh: Mesh, signals: StopSignals) -> tuple[Run, Iterable[StepBatch]]:
    """Builds all parts of a run and resumes it; returns them with this rank's steps that are left. All ranks call it.

    Raises:
        ConfigError: if ranks were started with different configurations, or a checkpoint does not fit.
    """
    assert mesh.coords == inputs.coords, f"the mesh gives {inputs.coords} the coords {mesh.coords}"
    assert mesh.is_reader == (inputs.dataset is not None), f"{mesh.coords} reads what it should not, or does not"
    mesh.check_agreement("configuration", repr(config), "Start all ranks with the same file and the same --set.")
    tokenizers = config.tokenizers
    check_same_files(
        mesh,
        {
            "tokenizers.text.path": tokenizers.text.path if config.data.has_texts else None,
            "tokenizers.visual.path": tokenizers.visual.path if config.data.has_images else None,
        },
    )
    check_same_sources(mesh, inputs.sources)
    device = compute_device()
    schedule = build_schedule(config, mesh)
    output = Path(config.training.output_dir)
    state = EngineState(schedule.engine, mesh)
    store = CheckpointStore(
        output / "checkpoints",
        config.training.keep_checkpoints,
        mesh,
        build_run_description(config, mesh.describe_layout()),
        config.parallel.timeout_seconds,
    )
    metrics_log = MetricsLog(output / "metrics.jsonl")
    first_step, checkpoint = resume(schedule.engine, state, store, metrics_log, mesh, config.training.total_steps)
    # Not opened before if there were checkpoints; none of them may be whole.
    if first_step == 0 and (weights := inputs.init_from or open_initial_weights(config)):
        check_same_files(mesh, {"training.init_from": config.training.init_from})
        weights.load(state)
        if mesh.is_main:
            print(weights.describe(), flush=True)
    setup = describe_startup(config, mesh, state, device, first_step)
    if mesh.is_main:
        print(setup, flush=True)
    if checkpoint and inputs.dataset:
        changes = inputs.dataset.order.resume(first_step, checkpoint.data, checkpoint.run.config)
        if mesh.is_main:
            for line in changes:
                print(line, flush=True)
    dtype = next(schedule.engine.module.parameters()).dtype
    who = mesh.describe(mesh.all_coords.index(mesh.coords))
    limits = WaitLimits(seconds=config.data.timeout_seconds, is_stopping=signals.is_any_received, where=who)
    steps = TimedSteps(build_train_loader(inputs.dataset, config.data, first_step, limits) if inputs.dataset else ())
    run = Run(
        config=config,
        schedule=schedule,
        state=state,
        mesh=mesh,
        device=device,
        visual_tokenizer=None if inputs.visual_tokenizer is None else inputs.visual_tokenizer.to(device),
        validation=BroadcastBatches(inputs.validation or (), mesh, PackedBatch),
        read_validation=functools.partial(_read_validation, inputs.validation, limits),
        store=store,
        metrics_log=metrics_log,
        progress=Progress(config.model, config.training.total_steps, peak_flops(device, dtype), mesh),
        stragglers=Stragglers(mesh, schedule.own_work, steps.stopwatch),
        first_step=first_step,
        order=None if inputs.dataset is None else inputs.dataset.order,
        data=checkpoint.data if checkpoint else {},
        broken_records=BrokenRecords(
            config.data.max_broken_records, mesh.data_host, records_from(checkpoint.data if checkpoint else {})
        ),
    )
    return run, BroadcastBatches(steps, mesh, StepBatch)


def _read_validation(validation: ValidationBatches | None, limits: WaitLimits) -> None:
    if validation is not None:
        validation.read(limits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0, or 2 after one clear line about what the user can mend."""
    return run_rank_program(lambda config, options: pretrain(config), "beit3_ds.pretrain", __doc__, arguments)


if __name__ == "__main__":
    sys.exit(main())
