"""Tests that commands end as programs of Unix do when their output cannot be written."""

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
    """Runs `beit3` in a shell with redirected streams; the last line of the output is its status.

    `inspect` prints 20,000 lines instead of loading torch.
    """
    script = f'set -o pipefail; "$0" -c "$@" {redirection}; echo "status $?"'
    command = ["bash", "-c", script, sys.executable, _PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")


def test_a_reader_that_ends_early_is_no_failure() -> None:
    """Catches a traceback and the statuses 1 and 120 of `beit3 inspect | head -1`."""
    done = run("| head -1", "inspect", "weights")
    assert (done.stdout, done.stderr) == ("line 0\nstatus 0\n", "")


def test_a_result_that_cannot_be_printed_is_a_failure() -> None:
    """Catches `beit3 inspect > FILE` on a full disk that ends with status 0 and half a file."""
    done = run("> /dev/full", "inspect", "weights")
    assert done.stdout == "status 1\n"
    assert done.stderr.splitlines()[1:] == ["error: the output cannot be written: No space left on device"]


def test_a_mistake_has_its_status_wherever_the_line_goes(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"no_such_key": 1}))
    assert run("> /dev/full 2>&1", "train", tmp_path / "run.json").stdout == "status 2\n"
    assert run("2>&1 | true", "train", tmp_path / "run.json").stdout == "status 2\n"


def test_help_goes_anywhere() -> None:
    assert run("> /dev/full", "--help").stdout == "status 0\n"
