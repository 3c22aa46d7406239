"""Tests that every numeric argument has a range, and that a mistake gives one line and status 2."""

import argparse
from collections.abc import Iterator

import pytest

from beit3_ds.cli.main import build_parser, main

QUICKSTART = "ds_configs/quickstart_cpu.json"


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):  # an alias is another name of one parser
                yield from actions(child)
        else:
            yield parser.prog, action


NUMBERS = [
    (prog, action.option_strings[0])
    for prog, action in actions(build_parser())
    if action.type is not None and action.option_strings
]


def test_no_argument_takes_any_number() -> None:
    """Catches `type=int`, which accepts -1 and numbers of a hundred digits."""
    assert [prog for prog, action in actions(build_parser()) if action.type in (int, float, complex)] == []
    assert len(NUMBERS) >= 15


@pytest.mark.parametrize(("prog", "option"), NUMBERS)
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e400", "9" * 30, "x", "", "1e6.5"])
def test_numbers_out_of_range_are_one_line(
    prog: str, option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = prog.split()[1:]
    names = {
        "launch": ["none", QUICKSTART],
        "check-cluster": ["none"],
        "import": ["a", "b"],
        "compare-runs": ["a", "b"],
    }
    positional = names.get(command[0], [] if command[0] in ("bench", "certify") else [QUICKSTART])
    assert main([*command, *positional, f"{option}={value}"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and f"argument {option}: " in error and f"(see {prog} --help)" in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["chekc", QUICKSTART], "invalid choice: 'chekc'"),
        (["check"], "required: config"),
        (["check", QUICKSTART, "--wrld-size", "2"], "unrecognized arguments: --wrld-size 2"),
    ],
)
def test_other_mistakes_are_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error


def test_a_rank_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    from beit3_ds.train import main as pretrain_main

    assert pretrain_main([QUICKSTART, "--local_rank=-1"]) == 2
    assert "argument --local_rank: it is -1; it must be at least 0" in capsys.readouterr().err
