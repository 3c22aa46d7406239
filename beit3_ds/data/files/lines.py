"""Reads lines in bounded memory, and blank lines quickly."""

import io
from collections.abc import Iterator
from typing import IO, AnyStr

_CHUNK = 1 << 20


def iterate_lines(file: IO[AnyStr], limit: int) -> Iterator[AnyStr]:
    """Yields the lines of a file with their ends; cuts a line of more than `limit` bytes or characters.

    A cut line has `limit` + 1 bytes or characters, so that its length shows that it was cut. A line ends with a
    newline, not with a carriage return alone.
    """
    while line := file.readline(limit + 1):
        if len(line) > limit:
            skip_line(file, line)
        yield line


def skip_line(file: IO[AnyStr], begin: AnyStr) -> int:
    """Skips the rest of a line of which `begin` was read; returns the number of skipped bytes or characters."""
    skipped, part = 0, begin
    while part and not (part.endswith("\n") if isinstance(part, str) else part.endswith(b"\n")):
        part = file.readline(_CHUNK)
        skipped += len(part)
    return skipped


def skip_blank_lines(file: io.BufferedReader) -> tuple[int, int]:
    """Skips the blank lines that follow in a file's buffer, at its position; returns their number and their bytes."""
    following = file.peek()
    blank = following[: len(following) - len(following.lstrip())]
    num_lines, num_bytes = blank.count(b"\n"), blank.rfind(b"\n") + 1
    file.read(num_bytes)
    return num_lines, num_bytes
