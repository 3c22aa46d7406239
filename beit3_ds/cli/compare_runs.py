"""Implements `beit3 compare-runs`, which compares the losses of two runs step by step."""

import argparse
import sys

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import real
from beit3_ds.config.numbers import Range


def add_compare_runs_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `compare-runs`."""
    command = add_command(subparsers, "compare-runs", _compare_runs, "compare the losses of two runs step by step")
    command.add_argument("runs", nargs=2, metavar="FOLDER", help="training.output_dir of a run")
    command.add_argument("--out", metavar="FILE.png", help="also draw both curves and their difference")
    command.add_argument(
        "--tolerance",
        type=real(Range(0)),
        metavar="NATS",
        help="exit with status 1 if the total losses of any step differ by more than NATS",
    )


def _compare_runs(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.training.comparison import compare_runs, plot_comparison

    comparison = compare_runs(*(Path(folder) for folder in options.runs))
    print(comparison.describe())
    if options.out:
        try:
            plot_comparison(comparison, Path(options.out))
        except Exception as error:  # matplotlib may raise any exception
            raise ConfigError(f"--out {options.out} cannot be drawn: {type(error).__name__}: {error}.") from error
    if options.tolerance is None:
        return 0
    difference, step = comparison.largest_difference("loss")
    if difference <= options.tolerance:
        return 0
    print(
        f"the losses of step {step} differ by {difference:.3g} nats, more than {options.tolerance:g}", file=sys.stderr
    )
    return 1
