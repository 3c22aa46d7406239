"""Tests that programs survive stdout and stderr that cannot be written, with real processes and devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import logging, sys
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler(sys.stdout))
if sys.stdout and not sys.stdout.write_through and not sys.stdout.isatty():
    print("before")
from beit3_ds.retrying.standard_streams import keep_standard_streams
keep_standard_streams(reports_closed_pipe="reports" in sys.argv)
keep_standard_streams()
for number in range(3):
    print(f"line {number}", flush=True)
early.warning("a logger")
print("to stderr", file=sys.stderr)
print("end")
"""


@pytest.fixture(params=["", "1"], ids=["buffered", "unbuffered"], autouse=True)
def buffering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Starts programs with and without `python -u`, which launchers use for ranks."""
    monkeypatch.setenv("PYTHONUNBUFFERED", request.param)
    return str(request.param)


def start(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a shell with redirected streams; returns the shell's output with the program's status."""
    script = f'set -o pipefail; "$0" -c "$1" {" ".join(arguments)} {redirection}; echo "status $?"'
    return subprocess.run(
        ["bash", "-c", script, sys.executable, _PROGRAM], capture_output=True, text=True, timeout=60, check=True
    )


WARNING = "WARNING: {} cannot be written: No space left on device. The program continues and writes the missing lines "


def test_streams_that_work_are_unchanged(buffering: str) -> None:
    result = start("")
    lines = "" if buffering else "before\n"
    lines += "line 0\nline 1\nline 2\na logger\nend\n"
    assert (result.stdout, result.stderr) == (f"{lines}status 0\n", "to stderr\n")


@pytest.mark.parametrize("argument", ["", "reports"])
def test_a_full_stdout_is_reported_once_on_stderr(argument: str) -> None:
    """Catches status 120, Python's result of a failed flush, and a traceback per line of a logger."""
    result = start("> /dev/full", argument)
    assert result.stdout == "status 0\n"
    assert result.stderr == WARNING.format("stdout") + "once that is possible.\nto stderr\n"


def test_a_full_stderr_is_reported_once_on_stdout() -> None:
    result = start("2> /dev/full")
    assert result.stdout.count("WARNING") == 1 and "end\n" in result.stdout and result.stdout.endswith("status 0\n")


def test_both_full() -> None:
    result = start("> /dev/full 2>&1")
    assert (result.stdout, result.stderr) == ("status 0\n", "")


def test_a_closed_pipe_is_silent_unless_asked_for() -> None:
    """Catches status 120, and the message "Exception ignored" that Python prints at its end."""
    assert (result := start("| true")).stderr == "to stderr\n" and result.stdout == "status 0\n"
    said = start("| true", "reports").stderr
    assert said == "WARNING: nobody reads stdout any more; the program continues without it\nto stderr\n"


def test_descriptors_that_are_closed_at_the_start() -> None:
    assert start(">&-").stdout == "status 0\n"
    assert start(">&- 2>&-").stdout == "status 0\n"


def test_output_appears_once_a_disk_has_room(tmp_path: Path) -> None:
    """Catches lines lost or repeated on a stdout that fails for a while, here because its size is limited."""
    program = """
import resource, signal, sys
from beit3_ds.retrying.standard_streams import keep_standard_streams
streams = keep_standard_streams()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for number in range(100):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 if 20 <= number < 80 else hard, hard))
    print(f"line {number}", flush=True)
assert streams.finish() is None
"""
    with open(tmp_path / "log", "w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True, timeout=60)
    assert (tmp_path / "log").read_text().splitlines() == [f"line {number}" for number in range(100)]


def test_a_terminal_that_is_gone() -> None:
    """Catches EIO at the next line after the terminal of a run was closed."""
    ours, theirs = os.openpty()
    later = _PROGRAM.replace('print("before")', "pass")
    program = f"import os, sys; os.write(1, b'started'); sys.stdin.readline()\n{later}"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert os.read(ours, 100).startswith(b"started")
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
