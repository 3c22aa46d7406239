"""Implements `beit3 inspect`, which prints the contents of a checkpoint or a weights file."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command


def add_inspect_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `inspect`."""
    summary = "print the contents of a checkpoint or file of weights: configuration, parameters per part, types, sizes"
    command = add_command(subparsers, "inspect", _inspect, summary)
    command.add_argument(
        "path", help="a checkpoint, a run's output folder, exported or imported weights, or a released .pth file"
    )
    command.add_argument("--tensors", action="store_true", help="also list every tensor")


def _inspect(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.weights.inspection import describe_weights

    print(describe_weights(Path(options.path), every_tensor=options.tensors))
    return 0
