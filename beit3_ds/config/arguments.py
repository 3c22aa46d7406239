"""The arguments of every command that takes a run's configuration."""

import argparse


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `config` and the repeatable `--set KEY=VALUE`, what `load_run_config` takes."""
    parser.add_argument("config", help="the run's JSON file, e.g. ds_configs/quickstart_cpu.json")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the file, e.g. training.total_steps=100 (repeatable)",
    )
