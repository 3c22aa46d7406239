"""Reads and skips lines of files in bounded memory."""

import io
from collections.abc import Iterator
from typing import IO, AnyStr

_CHUNK = 1 << 20


def iterate_lines(file: IO[AnyStr], limit: int) -> Iterator[AnyStr]:
    """Yields the lines of a file with their newlines. The part of a line after `limit` + 1 bytes or characters is
    skipped.

    If a yielded line has `limit` + 1 bytes or characters, a part of it may be missing. A carriage return alone does not
    end a line.
    """
    while line := file.readline(limit + 1):
        if len(line) > limit:
            skip_line(file, line)
        yield line


def skip_line(file: IO[AnyStr], begin: AnyStr) -> int:
    """Skips the rest of a line whose beginning has already been read; returns the number of bytes or characters of the
    rest.

    Args:
        file: file, positioned after `begin`.
        begin: beginning of the line.
    """
    skipped, part = 0, begin
    while part and not (part.endswith("\n") if isinstance(part, str) else part.endswith(b"\n")):
        part = file.readline(_CHUNK)
        skipped += len(part)
    return skipped


def skip_blank_lines(file: io.BufferedReader) -> tuple[int, int]:
    """Skips the blank lines at the start of the file's read buffer; returns the numbers of skipped lines and bytes."""
    following = file.peek()
    blank = following[: len(following) - len(following.lstrip())]
    num_lines, num_bytes = blank.count(b"\n"), blank.rfind(b"\n") + 1
    file.read(num_bytes)
    return num_lines, num_bytes
