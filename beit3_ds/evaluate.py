"""Evaluates weights on a whole split: `deepspeed --module beit3_ds.evaluate CONFIG.json --weights FILE`.

`beit3 evaluate` does the same in one process. Metrics are the same on any number of ranks.
"""

import beit3_ds.runtime.checked_environment  # noqa: F401

# isort: split

import argparse
import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.config import ConfigError, RunConfig, check_layout
from beit3_ds.config.data import Split
from beit3_ds.data import WaitLimits
from beit3_ds.data.workers.waiting import StopRequestedError
from beit3_ds.model.adaptation import AdaptedWeights
from beit3_ds.model.pretrained import PretrainedWeights, check_task
from beit3_ds.parallel import BroadcastBatches, Mesh
from beit3_ds.rank_program import run_rank_program
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.runtime.command_signals import StoppedBySignal, end_program
from beit3_ds.runtime.distributed_stop_signals import DistributedStopSignals
from beit3_ds.runtime.launch_environment import read_launch
from beit3_ds.runtime.process_group import compute_device, joined_ranks
from beit3_ds.runtime.rank_lock import locked_by_rank_0
from beit3_ds.runtime.startup_watchdog import watched_start
from beit3_ds.runtime.stop_deadline import stop_deadline
from beit3_ds.runtime.stop_signals import StopSignals
from beit3_ds.tasks import RankTask, Task, build_task
from beit3_ds.tasks.metrics_file import unwritable, write_metrics
from beit3_ds.train import share_of
from beit3_ds.training.agreement import check_same_files, check_same_sources
from beit3_ds.training.engine import build_schedule
from beit3_ds.training.evaluation import evaluate_split
from beit3_ds.training.model_evaluator import ModelEvaluator
from beit3_ds.training.split_batches import SplitBatches, StoppableBatches
from beit3_ds.training.start_checks import check_device
from beit3_ds.weights.reader import open_weights

SPLITS: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Holds this rank's inputs, which are opened and checked before a process group exists."""

    task: Task
    rank_task: RankTask
    weights: AdaptedWeights
    step: int
    """Number of optimizer steps that produced the weights; 0 if unknown."""
    folder: ResultFolder
    """Folder for the results."""


def evaluate_weights(config: RunConfig, options: argparse.Namespace) -> None:
    """Evaluates weights on a split of the configuration's data, and writes the results.

    Args:
        config: the run's configuration.
        options: parsed command-line options (`add_options`).

    Raises:
        ConfigError: if the configuration, a data file or the weights are invalid, or if the weights belong to another
            task.
        StoppedBySignal: if a rank received a stop signal; no metrics are then written.
    """
    rank, stopped_by = read_launch(os.environ).rank, None
    with StopSignals().handling() as signals, stop_deadline(rank, signals) as deadline:
        with watched_start(rank, config.data.timeout_seconds):
            inputs = open_inputs(config, options)
        folder = inputs.folder.path
        lock_path = _create_folder(folder) / "evaluation.lock"
        with (
            locked_by_rank_0(lock_path, str(folder), "name another folder with --out", signals) as contended_at,
            joined_ranks(config.parallel, str(folder), signals, contended_at) as mesh,
        ):
            evaluator = build_evaluator(config, inputs, mesh, signals, options.split)
            deadline.limit_all("the evaluation", "It wrote no metrics; the same command starts again.")
            try:
                metrics = evaluator.mean_terms(config.data.source_names(options.split))
                metrics |= evaluate_split(inputs.rank_task, evaluator, options.split, inputs.folder)
            except StopRequestedError:
                stop = DistributedStopSignals(signals, mesh)
                stop.synchronize()
                stopped_by = stop.first
            else:
                if mesh.is_main:
                    _write_metrics(config, inputs, options, metrics)
    if stopped_by is not None:
        raise StoppedBySignal(stopped_by)


def open_inputs(config: RunConfig, options: argparse.Namespace) -> Inputs:
    """Opens the weights, and this rank's share of the split's samples.

    Args:
        config: the run's configuration.
        options: parsed command-line options (`add_options`).

    Raises:
        ConfigError: if weights or samples cannot be read, if the weights do not fit the configuration, or if the split
            has no sources.
    """
    launch = read_launch(os.environ)
    data_parallel_size = check_layout(config, launch.world_size)
    split: Split = options.split
    config.data.check_has(split)
    task = build_task(config)
    check_device(config.training)
    stored = _open_weights(options.weights, averages=options.ema, best=options.best)
    where = f"--weights {options.weights}"
    check_task(stored.task, config.task.name, where, needs_head=True)
    task.adopt_weights(stored.task, where)
    weights = AdaptedWeights(stored, config.model, where, seed=config.training.seed)
    with torch.device("meta"):
        wanted = {name: parameter.shape for name, parameter in task.build_model().named_parameters()}
    if absent := weights.check(wanted):
        raise ConfigError(
            f"{where} lacks {', '.join(absent)}: it holds no head of the task {config.task.name}. Evaluate the weights "
            "of a run of this task, or train first."
        )
    coords = config.parallel.rank_coords(launch.rank, launch.world_size)
    rank_task = task.open(share_of(coords, config.parallel, data_parallel_size, (split,)))
    folder = Path(options.out or Path(config.training.output_dir) / "evaluation" / split)
    results = ResultFolder(folder, functools.partial(print, flush=True))
    return Inputs(task=task, rank_task=rank_task, weights=weights, step=stored.step, folder=results)


def _create_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from None
    return folder


def _open_weights(path: str, *, averages: bool, best: bool) -> PretrainedWeights | CheckpointFolder:
    weights = open_weights(path, averages=averages, best=best)
    if isinstance(weights, PretrainedWeights | CheckpointFolder):
        return weights
    raise ConfigError(f"--weights {path} is in another project's format. Convert it first: `beit3 import {path} OUT`.")


def build_evaluator(
    config: RunConfig, inputs: Inputs, mesh: Mesh, signals: StopSignals, split: Split
) -> ModelEvaluator:
    """Builds this rank's evaluator, with weights loaded into its part of the model. All ranks must call this function.

    Args:
        config: the run's configuration.
        inputs: this rank's inputs.
        mesh: mesh of all ranks.
        signals: stop signals that this rank receives.
        split: split to evaluate.

    Raises:
        ConfigError: if ranks have different configurations, files or weights.
    """
    task, rank_task = inputs.task, inputs.rank_task
    mesh.check_agreement("configuration", repr(config), "Start all ranks with the same file and the same --set.")
    check_same_files(mesh, rank_task.files)
    check_same_sources(mesh, rank_task.sources)
    device = compute_device()
    rank_task.start(mesh, device)
    schedule = build_schedule(task, mesh, trains=False)
    names = {name for name, _ in schedule.engine.module.named_parameters()}
    EngineState(schedule.engine, mesh).load_weights(
        lambda kind, name, part: inputs.weights.read(name, part).float(), names
    )
    who = mesh.describe(mesh.all_coords.index(mesh.coords))
    limits = WaitLimits(seconds=config.data.timeout_seconds, is_stopping=signals.is_any_received, where=who)
    return ModelEvaluator(
        schedule=schedule,
        mesh=mesh,
        device=device,
        terms=task.terms,
        rank_task=rank_task,
        weights=inputs.weights,
        validation=StoppableBatches(
            BroadcastBatches(rank_task.validation or (), mesh, PackedBatch), mesh, signals.is_any_received
        ),
        splits={split: SplitBatches(rank_task.evaluation.get(split), mesh, limits)},
        is_stopping=signals.is_any_received,
    )


def _write_metrics(
    config: RunConfig, inputs: Inputs, options: argparse.Namespace, metrics: Mapping[str, float]
) -> None:
    content = {
        "task": config.task.name,
        "split": options.split,
        "weights": str(options.weights),
        "step": inputs.step,
        "metrics": dict(metrics),
    }
    write_metrics(content, inputs.folder)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the command-line options of an evaluation to a parser."""
    parser.add_argument(
        "--weights", required=True, help="exported or imported weights, a checkpoint, or a run's folder"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="validation", help="sources to evaluate (default: validation)"
    )
    parser.add_argument("--out", help="folder of the results (default: OUTPUT_DIR/evaluation/SPLIT)")
    parser.add_argument("--ema", action="store_true", help="evaluate the moving averages of a checkpoint")
    parser.add_argument("--best", action="store_true", help="evaluate the best checkpoint of a run, not the newest")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line on one rank, and returns the exit status (`run_rank_program`)."""
    return run_rank_program(evaluate_weights, "beit3_ds.evaluate", __doc__, add_options, arguments)


if __name__ == "__main__":
    end_program(main())
