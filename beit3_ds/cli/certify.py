"""Implements `beit3 certify`, which tests and measures kernels and training steps on this machine."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.cli.compile_kernels import ARCHITECTURES
from beit3_ds.config.arguments import real
from beit3_ds.config.numbers import Range


def add_certify_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `certify`."""
    summary = "test and measure the kernels and training steps on this machine, and write one report"
    command = add_command(subparsers, "certify", _certify, summary)
    command.add_argument(
        "--out",
        default="certificate",
        metavar="DIR",
        help="folder for the report (default: certificate); existing results in it are not measured again",
    )
    command.add_argument(
        "--minutes",
        type=real(Range(0.1, 1e5)),
        metavar="N",
        help="maximum minutes for this call; a later call continues (default: no limit)",
    )
    command.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run only these sections")
    command.add_argument(
        "--dry-run",
        choices=ARCHITECTURES,
        metavar="SM",
        help="emulate a GPU: sm_80 (A100), sm_90 (H100, H200) or sm_100 (B200); kernels are compiled into Triton's "
        "cache and do not run, so results are undefined",
    )
    command.add_argument("--list", action="store_true", help="print the sections in order, and run nothing")


def _certify(options: argparse.Namespace) -> int:
    from pathlib import Path

    from beit3_ds.benchmarks.certify.runner import certify, describe_plan

    if options.list:
        print(describe_plan())
        return 0
    architecture = ARCHITECTURES.get(options.dry_run)
    return certify(Path(options.out), minutes=options.minutes, only=options.only, architecture=architecture)
