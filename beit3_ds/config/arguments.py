"""Defines command-line arguments that several commands share, and argparse types for numbers in a range."""

import argparse
from collections.abc import Callable
from typing import NoReturn

from beit3_ds.config.numbers import Range, show_number
from beit3_ds.config.strict import ConfigError


class OneLineParser(argparse.ArgumentParser):
    """Parses a command line, and reports a mistake as a one-line `ConfigError` instead of argparse's usage text."""

    def error(self, message: str) -> NoReturn:
        """Raises a `ConfigError` with argparse's message and a hint to use `--help`."""
        raise ConfigError(f"{message} (see {self.prog} --help)")


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments `config` and `--set KEY=VALUE`, whose values go to `load_run_config`."""
    parser.add_argument("config", help="the run's JSON file, e.g. ds_configs/quickstart_cpu.json")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the file, e.g. training.total_steps=100 (repeatable)",
    )


def integer(allowed: Range) -> Callable[[str], int]:
    """Returns an argparse `type` that accepts the integers in a range."""

    def parse(text: str) -> int:
        return int(_check(_number(int, text), allowed))

    return parse


def real(allowed: Range) -> Callable[[str], float]:
    """Returns an argparse `type` that accepts the numbers in a range."""

    def parse(text: str) -> float:
        return _check(_number(float, text), allowed)

    return parse


def _number(kind: type[int] | type[float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        name = "an integer" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {name}") from None


def _check(value: float, allowed: Range) -> float:
    if value not in allowed:
        raise argparse.ArgumentTypeError(f"it is {show_number(value)}; it must be {allowed}")
    return value


def add_force_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Adds the option `--force`, which makes a command overwrite an existing result.

    Args:
        parser: parser of the command.
        text: help text of the option.
    """
    parser.add_argument("--force", action="store_true", help=text)
