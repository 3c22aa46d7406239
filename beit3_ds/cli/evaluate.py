"""Implements `beit3 evaluate`, which scores weights, or existing results, on a whole split in one process."""

import argparse
from typing import TYPE_CHECKING

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import add_config_arguments

if TYPE_CHECKING:
    from beit3_ds.config import RunConfig


def add_evaluate_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `evaluate`."""
    summary = (
        "score weights on all samples of a split in one process; use the deepspeed launcher with --module "
        "beit3_ds.evaluate for more ranks"
    )
    details = "With --results, no model runs: the command scores results that this or another program has written."
    command = add_command(subparsers, "evaluate", _evaluate, summary, details=details, writes_files=True)
    add_config_arguments(command)
    origin = command.add_mutually_exclusive_group(required=True)
    origin.add_argument("--weights", help="exported or imported weights, a checkpoint, or a run's folder")
    origin.add_argument(
        "--results",
        action="append",
        metavar="PATH",
        help="detection: a result file in COCO's format, once for boxes and once for masks; segmentation: a folder of "
        "PNGs with class + 1 per pixel",
    )
    command.add_argument(
        "--split", choices=("validation", "test"), default="validation", help="split to score (default: validation)"
    )
    command.add_argument(
        "--out",
        help="folder of the results (default: OUTPUT_DIR/evaluation/SPLIT, or OUTPUT_DIR/scores/SPLIT for --results)",
    )
    command.add_argument(
        "--ema", action="store_true", help="evaluate the moving average of the weights (training.ema_decay)"
    )
    command.add_argument(
        "--best",
        action="store_true",
        help="evaluate the best checkpoint of a run instead of the newest (training.best_metric)",
    )


def _evaluate(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    config = load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    if options.results:
        return _score_results(config, options)
    from beit3_ds.evaluate import main as evaluate_main

    arguments = [options.config, *(f"--set={change}" for change in options.set), "--weights", options.weights]
    arguments += ["--split", options.split, *(["--out", options.out] if options.out else [])]
    return evaluate_main([*arguments, *(flag for flag in ("--ema", "--best") if getattr(options, flag[2:]))])


def _score_results(config: "RunConfig", options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.retrying.folder import ResultFolder
    from beit3_ds.tasks import build_task
    from beit3_ds.tasks.metrics_file import write_metrics

    if options.ema or options.best:
        raise ConfigError("--ema and --best choose among the weights of a run. Leave them out with --results.")
    config.data.check_has(options.split)
    folder = ResultFolder(Path(options.out or Path(config.training.output_dir) / "scores" / options.split), print)
    metrics = build_task(config).score_results(options.results, options.split, folder)
    content = {"task": config.task.name, "split": options.split, "results": options.results, "metrics": metrics}
    write_metrics(content, folder)
    return 0
