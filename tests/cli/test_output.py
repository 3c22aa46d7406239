"""Tests how commands end when their output cannot be written: like other Unix programs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from beit3_ds.cli import inspect_weights, main
def print_many(options):
    for number in range(20_000):
        print(f"line {number}")
    return 0
inspect_weights._inspect = print_many
sys.exit(main.main(sys.argv[1:]))
"""


def run(redirection: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `beit3` in a shell with redirected streams; the last line of the output is the exit status.

    The command `inspect` is replaced by one that prints 20,000 lines without loading torch.
    """
    script = f'set -o pipefail; "$0" -c "$@" {redirection}; echo "status $?"'
    command = ["bash", "-c", script, sys.executable, _PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")


def test_a_reader_that_ends_early_is_no_failure() -> None:
    """Catches `beit3 inspect | head -1` that ends with a traceback, or with status 1 or 120."""
    done = run("| head -1", "inspect", "weights")
    assert (done.stdout, done.stderr) == ("line 0\nstatus 0\n", "")


def test_a_result_that_cannot_be_printed_is_a_failure() -> None:
    """Catches `beit3 inspect > FILE` that reports success although a full disk cut the file."""
    done = run("> /dev/full", "inspect", "weights")
    assert done.stdout == "status 1\n"
    assert done.stderr.splitlines()[1:] == ["error: the output cannot be written: No space left on device"]


def test_a_mistake_has_its_status_wherever_the_line_goes(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"no_such_key": 1}))
    assert run("> /dev/full 2>&1", "train", tmp_path / "run.json").stdout == "status 2\n"
    assert run("2>&1 | true", "train", tmp_path / "run.json").stdout == "status 2\n"


def test_help_goes_anywhere() -> None:
    assert run("> /dev/full", "--help").stdout == "status 0\n"
