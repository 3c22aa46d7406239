"""Reads and skips lines of files in bounded memory; skips many blank lines at once."""

import io
from collections.abc import Iterator
from typing import IO, AnyStr

_CHUNK = 1 << 20


def iterate_lines(file: IO[AnyStr], limit: int) -> Iterator[AnyStr]:
    """Yields the lines of a file with their ends; cuts a line of more than `limit` bytes or characters.

    A cut line has `limit` + 1 bytes or characters. A line ends with a newline, not with a carriage return alone.
    """
    while line := file.readline(limit + 1):
        if len(line) > limit:
            skip_line(file, line)
        yield line


def skip_line(file: IO[AnyStr], begin: AnyStr) -> int:
    """Skips the rest of a line whose beginning, `begin`, was read; returns how many bytes or characters it skipped."""
    skipped, part = 0, begin
    while part and not (part.endswith("\n") if isinstance(part, str) else part.endswith(b"\n")):
        part = file.readline(_CHUNK)
        skipped += len(part)
    return skipped


def skip_blank_lines(file: io.BufferedReader) -> tuple[int, int]:
    """Skips blank lines at a file's position, as far as they are buffered; returns their number and total bytes."""
    following = file.peek()
    blank = following[: len(following) - len(following.lstrip())]
    num_lines, num_bytes = blank.count(b"\n"), blank.rfind(b"\n") + 1
    file.read(num_bytes)
    return num_lines, num_bytes
