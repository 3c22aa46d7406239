"""Implements `beit3 train`, which trains in one process."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments, add_force_argument


def add_train_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `train`."""
    summary = "train the task of a run in one process, or resume; use the deepspeed launcher for more ranks"
    command = add_command(subparsers, "train", _train, summary, writes_files=True)
    add_config_arguments(command)
    add_force_argument(command, "train again if the run is finished; its checkpoints are moved aside")


def _train(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.train import main as train_main

    arguments = [options.config, *(f"--set={change}" for change in options.set)]
    return train_main([*arguments, *(["--force"] if options.force else [])])
