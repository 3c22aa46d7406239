"""Adds one command to a parser's subcommands."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""Subcommands of a parser: the result of `ArgumentParser.add_subparsers`."""


def add_command(
    subparsers: Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    *,
    details: str = "",
    epilog: str | None = None,
    writes_files: bool = False,
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser, so that the caller can add arguments.

    Args:
        subparsers: subcommands to which the command is added.
        name: name of the command on the command line.
        run: function that runs the command and returns the exit status.
        summary: one line without a full stop, for the list of commands and for the command's help.
        details: more sentences for the command's help, after the summary.
        epilog: text below the options in the command's help; line breaks are kept.
        writes_files: whether the command writes its results to files. Such a command does not fail if its output cannot
            be printed.
    """
    command = subparsers.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {details}".rstrip(),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter if epilog else argparse.HelpFormatter,
    )
    command.set_defaults(run=run, writes_files=writes_files)
    return command
