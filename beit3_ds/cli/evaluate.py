"""Implements `beit3 evaluate`, which evaluates weights on a whole split in one process."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments


def add_evaluate_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `evaluate`."""
    summary = (
        "score weights on all samples of a split in one process; use the deepspeed launcher with --module "
        "beit3_ds.evaluate for more ranks"
    )
    command = add_command(subparsers, "evaluate", _evaluate, summary, writes_files=True)
    add_config_arguments(command)
    command.add_argument(
        "--weights", required=True, help="exported or imported weights, a checkpoint, or a run's folder"
    )
    command.add_argument("--split", choices=("validation", "test"), default="validation", help="(default: validation)")
    command.add_argument("--out", help="folder of the results (default: OUTPUT_DIR/evaluation/SPLIT)")
    command.add_argument("--ema", action="store_true", help="evaluate the moving averages of a checkpoint")
    command.add_argument("--best", action="store_true", help="evaluate the best checkpoint of a run, not the newest")


def _evaluate(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.evaluate import main as evaluate_main

    arguments = [options.config, *(f"--set={change}" for change in options.set), "--weights", options.weights]
    arguments += ["--split", options.split, *(["--out", options.out] if options.out else [])]
    return evaluate_main([*arguments, *(flag for flag in ("--ema", "--best") if getattr(options, flag[2:]))])
