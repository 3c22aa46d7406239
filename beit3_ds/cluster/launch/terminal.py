"""Prints the messages of `beit3 launch` to the terminal, and writes them to a file beside the ranks' logs."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from beit3_ds.printing import printable
from beit3_ds.retrying.stream import RetryingStream

_PREFIX = "beit3 launch: "


class Terminal:
    """Prints the messages of `beit3 launch` to stderr and to a log file, and the output of rank 0 to stdout.

    A closed terminal or a full disk does not end a run. Lines that could not be written to the log file are written
    later.
    """

    def __init__(self, log: Path) -> None:
        """Creates a terminal that appends the messages of `beit3 launch` to the file `log`."""
        self._path = log
        self._log = RetryingStream(lambda: open_log(log), self._report_error)

    def report(self, text: str, lines: Iterable[str] = ()) -> None:
        """Prints a message of `beit3 launch`, followed by quoted lines, such as the last output of a rank."""
        text, quoted = printable(text), "".join(f"    | {printable(line)}\n" for line in lines)
        with contextlib.suppress(OSError, ValueError):
            print(f"{_PREFIX}{text}\n{quoted}", end="", file=sys.stderr, flush=True)
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n{quoted}".encode())

    def print_output(self, text: str) -> None:
        """Prints output of rank 0 to stdout."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
            sys.stdout.flush()

    def _report_error(self, error: OSError) -> None:
        with contextlib.suppress(OSError, ValueError):
            print(f"{_PREFIX}{self._path} cannot be written: {error.strerror}", file=sys.stderr, flush=True)


def open_log(path: Path) -> int:
    """Opens a log file for appending and returns the file descriptor.

    Raises:
        OSError: if the file cannot be opened.
    """
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def last_lines(path: Path, count: int = 20) -> list[str]:
    """Returns at most the last `count` lines of a log file; an empty list if the file cannot be read.

    Reads only the last 500 * `count` bytes. If lines are long, fewer lines are returned, and the first may be cut.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 500 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
