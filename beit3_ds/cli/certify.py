"""Implements `beit3 certify`, which tests and measures the kernels, a step and a layout on this machine's GPUs."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command


def add_certify_command(subparsers: Subparsers) -> None:
    """Adds `certify` to a parser's subcommands."""
    summary = "test and measure the kernels, a step and a layout on this machine's GPUs, and write one report"
    command = add_command(subparsers, "certify", _certify, summary)
    command.add_argument(
        "--out", default="certificate", metavar="DIR", help="folder for the report (default: certificate)"
    )
    command.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="run the steps whose names contain one of these words"
    )


def _certify(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.benchmarks.certify.certificate import certify

    return certify(Path(options.out), only=options.only)
