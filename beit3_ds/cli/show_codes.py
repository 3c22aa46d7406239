"""Implements `beit3 show-codes`, which draws images and masks, and shows the visual tokenizer's codes as colours."""

import argparse

from beit3_ds.cli.command import Subparsers, add_command
from beit3_ds.config.arguments import add_config_arguments


def add_show_codes_command(subparsers: Subparsers) -> None:
    """Adds the subcommand `show-codes`."""
    summary = "draw training images, their masks and, as colours, their visual codes"
    command = add_command(subparsers, "show-codes", _show_codes, summary, writes_files=True)
    add_config_arguments(command)
    command.add_argument(
        "--out", default="codes.png", metavar="FILE.png", help="the picture to write (default: codes.png)"
    )


def _show_codes(options: argparse.Namespace) -> int:
    from beit3_ds.config import load_run_config
    from beit3_ds.tasks.visual_tokenizer.code_picture import write_code_picture
    from beit3_ds.tokenizers import check_visual_tokenizer_fits, load_visual_tokenizer

    config = load_run_config(options.config, options.set)
    tokenizer = load_visual_tokenizer(config.tokenizers.visual.path)
    check_visual_tokenizer_fits(tokenizer, config)
    write_code_picture(config, tokenizer, options.out)
    print(f"wrote {options.out}: views, masked views and codes; teacher: {tokenizer.teacher_description}")
    return 0
