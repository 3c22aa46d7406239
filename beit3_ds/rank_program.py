"""Runs the command line of a program that the `deepspeed` launcher starts on each rank."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence

from beit3_ds.config import ConfigError, RunConfig, load_run_config
from beit3_ds.config.arguments import OneLineParser, add_config_arguments, integer
from beit3_ds.config.numbers import Range
from beit3_ds.printing import printable
from beit3_ds.retrying.standard_streams import keep_standard_streams
from beit3_ds.runtime.command_signals import StoppedBySignal, ending_on_signals
from beit3_ds.runtime.environment import check_this_machine, check_variables
from beit3_ds.runtime.launch_environment import read_launch
from beit3_ds.storage_error import StorageError
from beit3_ds.training.skipped_steps import NonFiniteLossError


def run_rank_program(
    program: Callable[[RunConfig, argparse.Namespace], None],
    name: str,
    description: str | None,
    add_options: Callable[[argparse.ArgumentParser], None],
    arguments: Sequence[str] | None,
) -> int:
    """Runs the command line of a program on one rank, and returns the exit status.

    If output cannot be printed, the program continues and its exit status does not change (`keep_standard_streams`). A
    second SIGINT can end the process at once, with status 130.

    Args:
        program: function that does this rank's work, given the configuration and the parsed options.
        name: name of the module, for the help text.
        description: description for the help text.
        add_options: function that adds the program's own options to a parser.
        arguments: command-line arguments; None uses those of the process.

    Returns:
        0 if the program ended normally, or saved its state and ended because of a stop signal. 1 for a failing file
        system, and 2 for an error that the user can fix. 128 + n if stop signal n ended a program that has no state to
        save. With a status other than 0, an error message without a traceback is printed.
    """
    streams = keep_standard_streams()
    parser = OneLineParser(prog=name, description=description)
    add_config_arguments(parser)
    add_options(parser)
    parser.add_argument("--local_rank", type=integer(Range(0)), help=argparse.SUPPRESS)  # the launcher passes it
    rank: int | str = "?"  # shown in errors until the rank is known
    try:
        with ending_on_signals():  # until the program handles them itself
            options = parser.parse_args(arguments)
            rank = read_launch(os.environ).rank
            check_variables(os.environ)
            check_this_machine(os.environ)
            program(load_run_config(options.config, options.set), options)
    except StoppedBySignal as stop:
        print(f"error on rank {rank}: {stop}", file=sys.stderr, flush=True)
        return stop.status
    except KeyboardInterrupt:
        line = "a second SIGINT ended this rank; the same command resumes from the newest checkpoint"
        print(f"error on rank {rank}: {line}", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # the threads of a process group could block or abort the end of the interpreter
    except (ConfigError, NonFiniteLossError) as error:
        print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2
    except StorageError as error:  # status 1: a restart may succeed without a change
        print(f"error on rank {rank}: {printable(str(error))}", file=sys.stderr, flush=True)
        return 1
    finally:
        streams.finish()
    return 0
