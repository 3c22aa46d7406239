"""Implements `beit3 check`, which checks a config for a given number of ranks without reading data."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments, integer, real
from beit3_ds.config.numbers import RANKS, Range


def add_check_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `check`."""
    summary = "check a config for a number of ranks and print what it would train; no data is read, nothing is started"
    command = add_command(subparsers, "check", _check, summary)
    add_config_arguments(command)
    command.add_argument("--world-size", type=integer(RANKS), default=1, metavar="N", help="ranks (default: 1)")
    command.add_argument(
        "--ranks-per-node",
        type=integer(Range(1, 1024)),
        metavar="N",
        help="ranks per node (default: 8, or all ranks if there are fewer)",
    )
    for name, text in (("memory", "memory"), ("shm", "/dev/shm")):
        command.add_argument(
            f"--node-{name}",
            type=real(Range(0, 1e6)),
            metavar="GIB",
            help=f"GiB of {text} that a node has; a run that needs more is refused",
        )
    command.add_argument(
        "--step-seconds",
        type=real(Range(0.001, 1e6)),
        default=1.0,
        metavar="S",
        help="assumed seconds per step, to compute rates per second (default: 1)",
    )


def _check(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    config = load_run_config(options.config, options.set)  # before the import of torch, to report errors at once
    from beit3_ds.data.validation_overlap import check_validation_apart
    from beit3_ds.planner import NodeSize
    from beit3_ds.training.dry_run import describe_dry_run

    check_validation_apart(config.data, must_exist=False)  # the data may be on other machines
    memory, shm = (None if gib is None else int(gib * 2**30) for gib in (options.node_memory, options.node_shm))
    node = NodeSize(memory=memory, shm=shm)
    print(describe_dry_run(config, options.world_size, options.ranks_per_node, node, options.step_seconds))
    if memory is None and shm is None:
        print("not compared with a machine: --node-memory and --node-shm do that; the run itself does it on every node")
    return 0
