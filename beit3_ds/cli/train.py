"""`beit3 train` and `beit3 train-visual-tokenizer`: trains in one process."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments, add_force_argument


def add_train_command(subparsers: Subparsers) -> None:
    """Adds `train` to a parser's subcommands."""
    summary = "train the task of a run in one process, or resume; use the deepspeed launcher for more ranks"
    add_config_arguments(add_command(subparsers, "train", _train, summary))


def add_train_visual_tokenizer_command(subparsers: Subparsers) -> None:
    """Adds `train-visual-tokenizer` to a parser's subcommands."""
    summary = (
        "train the run's VQ-KD tokenizer on its images in one process, or resume; use the deepspeed launcher with "
        "--module beit3_ds.train_visual_tokenizer for more ranks"
    )
    command = add_command(subparsers, "train-visual-tokenizer", _train_visual_tokenizer, summary)
    add_config_arguments(command)
    add_force_argument(command)


def _train(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.train import main as train_main

    return train_main(_config_arguments(options))


def _train_visual_tokenizer(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config

    load_run_config(options.config, options.set)  # before the seconds that DeepSpeed takes to import
    from beit3_ds.train_visual_tokenizer import main as train_main

    return train_main([*_config_arguments(options), *(["--force"] if options.force else [])])


def _config_arguments(options: argparse.Namespace) -> list[str]:
    return [options.config, *(f"--set={change}" for change in options.set)]
