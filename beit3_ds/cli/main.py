"""Runs the `beit3` command: builds the parser of all subcommands and runs one subcommand.

Commands import torch and DeepSpeed inside their functions, so that mistakes on the command line are reported at once.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from beit3_ds.cli.bench import add_bench_command
from beit3_ds.cli.certify import add_certify_command
from beit3_ds.cli.check import add_check_command
from beit3_ds.cli.check_cluster import add_check_cluster_command
from beit3_ds.cli.compare_runs import add_compare_runs_command
from beit3_ds.cli.compile_kernels import add_compile_kernels_command
from beit3_ds.cli.evaluate import add_evaluate_command
from beit3_ds.cli.export import add_export_command
from beit3_ds.cli.import_weights import add_import_command
from beit3_ds.cli.inspect_weights import add_inspect_command
from beit3_ds.cli.launch import add_launch_command
from beit3_ds.cli.predict import add_predict_command
from beit3_ds.cli.prepare import add_prepare_command
from beit3_ds.cli.show_codes import add_show_codes_command
from beit3_ds.cli.show_samples import add_show_samples_command
from beit3_ds.cli.train import add_train_command
from beit3_ds.cli.train_text_tokenizer import add_train_text_tokenizer_command
from beit3_ds.config import ConfigError
from beit3_ds.config.arguments import OneLineParser
from beit3_ds.printing import printable
from beit3_ds.retrying.standard_streams import keep_standard_streams
from beit3_ds.runtime.command_signals import StoppedBySignal, end_program, ending_on_signals
from beit3_ds.runtime.environment import check_variables
from beit3_ds.storage_error import StorageError

_EPILOG = """typical order:
  beit3 check ds_configs/quickstart_cpu.json --world-size 2
  beit3 train-text-tokenizer ds_configs/quickstart_cpu.json
  beit3 train ds_configs/quickstart_visual_tokenizer_cpu.json
  deepspeed --num_gpus 2 --module beit3_ds.train ds_configs/quickstart_cpu.json
with data.cache_dir set, once: `beit3 prepare index` first, `beit3 prepare texts` after the text tokenizer

One JSON file describes one run: DeepSpeed's own keys and a "beit3_ds" section (model, data, tokenizers, training,
parallel).
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit status.

    * 0: success.
    * 1: a check failed, a file system failed, or the output could not be printed.
    * 2: a mistake that the user can fix; it was reported in one line.
    * 128 + n: signal n stopped a command that does not handle signals itself.

    A command that writes its results to files (`add_command`) does not fail if its output cannot be printed. No command
    fails if the program that reads the output, such as `head -1`, has ended early.

    Args:
        arguments: command line without the program's name; None takes `sys.argv`.
    """
    streams = keep_standard_streams()
    try:
        with ending_on_signals():
            options = build_parser().parse_args(arguments)
            check_variables(os.environ)
            run: Callable[[argparse.Namespace], int] = options.run
            status = run(options)
            error = streams.finish()
        if error is not None and not status and not options.writes_files:
            print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
            return 1
        return status
    except StoppedBySignal as stop:
        print(f"error: {stop}", file=sys.stderr)
        return stop.status
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (StorageError, OSError) as error:  # OSError: a disk is full or a folder is read-only
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Builds the parser of all commands. In the parsed options, `run` is the function of the chosen command."""
    parser: argparse.ArgumentParser = OneLineParser(
        prog="beit3",
        description="Pretrain BEiT-3 on images, texts and image-text pairs, fine-tune it, and use the weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    add_check_command(subparsers)
    add_prepare_command(subparsers)
    add_train_text_tokenizer_command(subparsers)
    add_show_codes_command(subparsers)
    add_show_samples_command(subparsers)
    add_train_command(subparsers)
    add_evaluate_command(subparsers)
    add_predict_command(subparsers)
    add_compare_runs_command(subparsers)
    add_check_cluster_command(subparsers)
    add_launch_command(subparsers)
    add_compile_kernels_command(subparsers)
    add_export_command(subparsers)
    add_import_command(subparsers)
    add_inspect_command(subparsers)
    add_bench_command(subparsers)
    add_certify_command(subparsers)
    return parser


def program() -> None:
    """Runs the program `beit3` and ends the process."""
    end_program(main())


if __name__ == "__main__":
    program()
