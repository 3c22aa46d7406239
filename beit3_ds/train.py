"""Trains the task of a run: `deepspeed --module beit3_ds.train CONFIG.json`, or `beit3 train CONFIG.json`.

This module connects the packages in the order in which data flows.
"""

import beit3_ds.runtime.checked_environment  # noqa: F401

# isort: split

import functools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from beit3_ds.batch import PackedBatch, StepBatch
from beit3_ds.checkpoint.collection import has_checkpoints
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.index import Index
from beit3_ds.checkpoint.run_description import build_run_description
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.config import ParallelConfig, RankCoords, RunConfig, check_layout
from beit3_ds.config.arguments import add_force_argument
from beit3_ds.config.data import Split
from beit3_ds.data import StepDataset, ValidationBatches, WaitLimits, build_train_loader
from beit3_ds.data.skipped_report import describe_skipped
from beit3_ds.parallel import BroadcastBatches, Mesh
from beit3_ds.pipeline.schedule import Schedule
from beit3_ds.planner import check_node, host_requirements
from beit3_ds.rank_program import run_rank_program
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.retrying.standard_streams import keep_standard_streams
from beit3_ds.runtime.command_signals import end_program
from beit3_ds.runtime.launch_environment import Launch, read_launch
from beit3_ds.runtime.node_size import measure_node
from beit3_ds.runtime.process_group import compute_device, joined_ranks
from beit3_ds.runtime.rank_lock import locked_by_rank_0
from beit3_ds.runtime.startup_watchdog import watched_start
from beit3_ds.runtime.stop_deadline import stop_deadline
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.tasks import RankShare, RankTask, Task, build_task
from beit3_ds.training.agreement import check_same_files, check_same_sources
from beit3_ds.training.best_checkpoint import BestCheckpoint, is_higher_better
from beit3_ds.training.broken_records import BrokenRecords, records_from
from beit3_ds.training.device_moves import build_device_moves
from beit3_ds.training.engine import build_schedule
from beit3_ds.training.flops import peak_flops
from beit3_ds.training.init_from import InitialWeights, open_initial_weights
from beit3_ds.training.loop import resume, train
from beit3_ds.training.metrics_log import MetricsLog
from beit3_ds.training.progress import Progress
from beit3_ds.training.report import report, write_missing
from beit3_ds.training.run import Run
from beit3_ds.training.split_batches import SplitBatches, StoppableBatches
from beit3_ds.training.start_checks import check_device, check_frozen_patterns, check_software, prepare_output_dir
from beit3_ds.training.startup_summary import describe_startup
from beit3_ds.training.stragglers import Stragglers, TimedSteps


def train_run(config: RunConfig, *, force: bool = False) -> None:
    """Trains a run's task to the end and writes the report. Resumes from the newest complete checkpoint, if any.

    The report includes the task's result file, if the task has one. SIGTERM, SIGINT, SIGUSR1 or SIGHUP stops the run
    early, with a checkpoint but without a report (`training.loop.train`). If the task's result file already exists
    (`Task.find_result`), prints one line and returns, so that a job script can be submitted again. If the last
    checkpoint exists but the result file does not, writes the report without training.

    Args:
        config: the run's configuration.
        force: True trains a finished run again, and renames its checkpoint folder first. A run is finished if its
            result file or its last checkpoint exists.

    Raises:
        ConfigError: if the configuration, a data file, a checkpoint or a file of the task is invalid.
        NonFiniteLossError: if training diverges.
    """
    if not force and (result := build_task(config).find_result()):
        if read_launch(os.environ).rank == 0:
            print(result, flush=True)
        return
    rank = read_launch(os.environ).rank
    with StopSignals().handling() as signals, stop_deadline(rank, signals) as deadline:
        with watched_start(rank, config.data.timeout_seconds):
            check_start(config)
        folder = Path(config.training.output_dir)
        target, way_out = f"training.output_dir={folder}", "choose another training.output_dir"
        with locked_by_rank_0(folder / "run.lock", target, way_out, signals) as contended_at:
            with watched_start(rank, config.data.timeout_seconds):
                inputs = open_inputs(config)
            with joined_ranks(config.parallel, str(folder), signals, contended_at) as mesh:
                run, steps = build_run(config, inputs, mesh, signals, force=force)
                try:
                    deadline.limit_waits(mesh.activity)
                    is_finished = train(run, steps, signals)
                    deadline.limit_all("the end of the run", "Its checkpoint is saved; the same command continues.")
                    if is_finished:
                        report(run, signals)
                finally:
                    write_missing(run)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Holds this rank's inputs, which are opened and checked before a process group exists."""

    coords: RankCoords
    """Mesh coordinates of this rank."""
    task: Task
    """The run's task."""
    rank_task: RankTask
    """The task on this rank, with its files open."""
    initial_weights: InitialWeights | None
    """Weights from which a run without a checkpoint starts. None if the run has a checkpoint, or draws its initial
    values from the seed."""


def check_start(config: RunConfig) -> None:
    """Checks the config, this machine and its software before the data are opened, and creates the output folder.

    Raises:
        ConfigError: if the layout is invalid, if the machine has too little memory for its ranks, if the optimizer or
            the kernels are not installed, or if the output folder cannot be written.
    """
    launch = read_launch(os.environ)
    check_layout(config, launch.world_size)
    task = build_task(config)
    _check_this_node(config, launch)
    check_software(config)
    check_device(config.training)
    check_frozen_patterns(task)
    is_higher_better(task)  # raises an error if the task lacks the metric
    prepare_output_dir(Path(config.training.output_dir))


def open_inputs(config: RunConfig) -> Inputs:
    """Opens the files that this rank reads. Call `check_start` first.

    Raises:
        ConfigError: if a file cannot be read or does not fit the model.
    """
    launch = read_launch(os.environ)
    data_parallel_size = check_layout(config, launch.world_size)
    task = build_task(config)
    coords = config.parallel.rank_coords(launch.rank, launch.world_size)
    share = share_of(coords, config.parallel, data_parallel_size)
    has_begun = has_checkpoints(Path(config.training.output_dir))  # then the file of initial weights may be gone
    initial_weights = None if has_begun else open_initial_weights(config)
    if initial_weights is not None:
        task.adopt_weights(initial_weights.task, f"training.init_from={config.training.init_from}")
    rank_task = task.open(share)
    if launch.rank == 0:
        for line in describe_skipped(rank_task.sources):
            print(line, flush=True)
    return Inputs(coords=coords, task=task, rank_task=rank_task, initial_weights=initial_weights)


def share_of(
    coords: RankCoords,
    parallel: ParallelConfig,
    data_parallel_size: int,
    splits: tuple[Split, ...] = RankShare.splits,
) -> RankShare:
    """Returns which samples a rank reads, and whether the rank's pipeline stage holds the embeddings or the head.

    Args:
        coords: mesh coordinates of the rank.
        parallel: the section "parallel", which gives the number of stages.
        data_parallel_size: number of data-parallel ranks.
        splits: splits to read.
    """
    embeds, predicts = coords.pipeline == 0, coords.pipeline == parallel.pipeline_parallel_size - 1
    return RankShare(
        data_parallel_rank=coords.data,
        data_parallel_size=data_parallel_size,
        embeds=embeds,
        predicts=predicts,
        reads=coords.tensor == 0 and (embeds or predicts),
        splits=splits,
    )


def _check_this_node(config: RunConfig, launch: Launch) -> None:
    """Checks that this machine has enough memory for the ranks that run on it.

    If the run has several ranks and the launcher does not set the number of ranks per host, nothing is checked.
    """
    ranks_here = 1 if launch.world_size == 1 else launch.local_size
    if ranks_here:
        check_node(host_requirements(config, launch.world_size, ranks_here), config, measure_node())


def build_run(
    config: RunConfig, inputs: Inputs, mesh: Mesh, signals: StopSignals, *, force: bool = False
) -> tuple[Run, Iterable[StepBatch]]:
    """Builds and resumes a run, and returns it with this rank's remaining steps. All ranks must call this function.

    Args:
        config: the run's configuration.
        inputs: this rank's inputs.
        mesh: mesh of all ranks.
        signals: stop signals that this rank receives.
        force: True trains a finished run again from step 0, and renames its checkpoint folder first. With False, a
            finished run has no remaining steps. A run is finished if its newest checkpoint contains all steps. An
            unfinished run is always resumed.

    Raises:
        ConfigError: if ranks have different configurations or files, or a checkpoint does not fit the model.
    """
    task, rank_task = inputs.task, inputs.rank_task
    assert mesh.coords == inputs.coords, f"the mesh gives {inputs.coords} the coords {mesh.coords}"
    assert mesh.is_reader == (rank_task.dataset is not None), f"{mesh.coords} reads what it should not, or does not"
    _check_agreement(config, rank_task, mesh)
    device = compute_device()
    rank_task.start(mesh, device)
    schedule = build_schedule(task, mesh)
    state = EngineState(schedule.engine, mesh, config.training.ema_decay)
    output_dir = Path(config.training.output_dir)
    say = functools.partial(print, flush=True) if mesh.is_main else _say_nothing
    metrics_log = MetricsLog(output_dir / "metrics.jsonl", say)
    store = _build_store(task, rank_task, mesh)
    total_steps = config.training.total_steps
    if force:
        store.move_finished_aside(total_steps)
    first_step, checkpoint = resume(schedule.engine, state, store, metrics_log, mesh, total_steps)
    if first_step == 0:
        _load_initial_weights(config, inputs, state, mesh, say)
    say(describe_startup(config, mesh, state, device, first_step))
    if rank_task.dataset:
        _start_data_order(rank_task.dataset, total_steps, first_step, checkpoint, say)
    data = checkpoint.data if checkpoint else {}
    who = mesh.describe(mesh.all_coords.index(mesh.coords))
    limits = WaitLimits(seconds=config.data.timeout_seconds, is_stopping=signals.is_any_received, where=who)
    dataset, validation = rank_task.dataset, rank_task.validation
    steps = TimedSteps(build_train_loader(dataset, config.data, first_step, limits) if dataset else ())
    run = Run(
        config=config,
        schedule=schedule,
        state=state,
        mesh=mesh,
        device=device,
        moves=build_device_moves(device),
        terms=task.terms,
        rank_task=rank_task,
        validation=StoppableBatches(
            BroadcastBatches(validation or (), mesh, PackedBatch), mesh, signals.is_any_received
        ),
        read_validation=functools.partial(_read_validation, validation, limits),
        splits={"validation": SplitBatches(rank_task.evaluation.get("validation"), mesh, limits)},
        store=store,
        results=ResultFolder(output_dir, functools.partial(print, flush=True)),
        metrics_log=metrics_log,
        progress=_build_progress(task, schedule, mesh, device),
        stragglers=Stragglers(mesh, schedule.own_work, steps.stopwatch),
        first_step=first_step,
        best=BestCheckpoint(config.training, is_higher_better=is_higher_better(task), data=data),
        order=None if dataset is None else dataset.order,
        data=data,
        is_stopping=signals.is_any_received,
        broken_records=BrokenRecords(config.data.max_broken_records, mesh.data_host, records_from(data)),
    )
    return run, BroadcastBatches(steps, mesh, StepBatch)


def _start_data_order(
    dataset: StepDataset, total_steps: int, first_step: int, checkpoint: Index | None, say: Callable[[str], None]
) -> None:
    """Prints the number of epochs, and restores the order of the samples from a checkpoint if there is one."""
    epochs = ", ".join(f"{number:.4g} of {name}" for name, number in dataset.epochs().items())
    say(f"epochs of all {total_steps:,} steps: {epochs}")
    if checkpoint:
        for line in dataset.order.resume(first_step, checkpoint.data, checkpoint.run.config):
            say(line)


def _check_agreement(config: RunConfig, rank_task: RankTask, mesh: Mesh) -> None:
    mesh.check_agreement("configuration", repr(config), "Start all ranks with the same file and the same --set.")
    check_same_files(mesh, rank_task.files)
    check_same_sources(mesh, rank_task.sources)


def _build_store(task: Task, rank_task: RankTask, mesh: Mesh) -> CheckpointStore:
    config = task.config
    tokenizers = {kind: path for kind in ("text", "visual") if (path := rank_task.files.get(f"tokenizers.{kind}.path"))}
    return CheckpointStore(
        Path(config.training.output_dir) / "checkpoints",
        config.training.keep_checkpoints,
        mesh,
        build_run_description(config, mesh.describe_layout(), task.describe(), task.describe_model(), tokenizers),
        config.parallel.timeout_seconds,
    )


def _load_initial_weights(
    config: RunConfig, inputs: Inputs, state: EngineState, mesh: Mesh, say: Callable[[str], None]
) -> None:
    # `open_inputs` opens no weights if there are checkpoints, but `--force` may have moved them aside since.
    weights = inputs.initial_weights or open_initial_weights(config)
    if weights:
        check_same_files(mesh, {"training.init_from": config.training.init_from})
        weights.load(state)
        say(weights.describe())


def _build_progress(task: Task, schedule: Schedule, mesh: Mesh, device: torch.device) -> Progress:
    dtype = next(schedule.engine.module.parameters()).dtype
    return Progress(task.terms, task.training_flops, task.config.training.total_steps, peak_flops(device, dtype), mesh)


def _say_nothing(line: str) -> None:
    """Prints nothing, because only the main rank prints."""


def _read_validation(validation: ValidationBatches | None, limits: WaitLimits) -> None:
    if validation is not None:
        validation.read(limits)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on one rank, and returns the exit status (`run_rank_program`)."""
    keep_standard_streams(reports_closed_pipe=True)
    return run_rank_program(
        lambda config, options: train_run(config, force=options.force),
        "beit3_ds.train",
        __doc__,
        lambda parser: add_force_argument(
            parser, "train again if the run is finished; its checkpoints are moved aside"
        ),
        arguments,
    )


if __name__ == "__main__":
    end_program(main())
