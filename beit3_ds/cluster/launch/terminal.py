"""Prints the lines of `beit3 launch` to the terminal and to a file next to the ranks' logs."""

import contextlib
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from beit3_ds.printing import printable

_PREFIX = "beit3 launch: "


class Terminal:
    """Prints the supervisor's lines to stderr and to a file, and the output of rank 0 to stdout.

    Errors are ignored: a closed terminal or a full disk must not end a run.
    """

    def __init__(self, log: Path) -> None:
        """Prints to stderr, and appends the supervisor's lines to the file `log`."""
        self._log = log

    def report(self, text: str, lines: Iterable[str] = ()) -> None:
        """Prints a message of the supervisor, followed by quoted lines, such as a rank's last output."""
        text, quoted = printable(text), "".join(f"    | {printable(line)}\n" for line in lines)
        with contextlib.suppress(OSError, ValueError):
            print(f"{_PREFIX}{text}\n{quoted}", end="", file=sys.stderr, flush=True)
        with contextlib.suppress(OSError), self._log.open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n{quoted}")

    def print_output(self, text: str) -> None:
        """Prints output of rank 0."""
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.write(text)
            sys.stdout.flush()


def last_lines(path: Path, count: int = 20) -> list[str]:
    """Returns the last `count` lines of a log file; an empty list if the file cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 500 * count))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except OSError:
        return []
