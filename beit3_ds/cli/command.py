"""Adds a command to a parser's group of subcommands."""

import argparse
from collections.abc import Callable
from typing import TypeAlias

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""A parser's group of subcommands; argparse gives its type no public name."""


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
    """Adds a command and returns its parser, to which the caller adds arguments.

    Args:
        subparsers: the group that gets the command.
        name: the word that the user types.
        run: runs the command and returns its exit status.
        summary: one line without a full stop, shown in the list of commands and, as a sentence, in the command's help.
        details: sentences that follow the summary in the command's help.
        epilog: text below the options, printed with its line breaks.
        writes_files: whether the results are files, so that the command does not fail if its output cannot be printed.
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
