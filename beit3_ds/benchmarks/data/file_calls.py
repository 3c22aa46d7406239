"""Counts the file calls of this process: Python's audit hook counts opens, and Linux counts reads."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_IO = "/proc/self/io"


@dataclass
class FileCalls:
    """Holds counts of this process's file calls, summed over all threads."""

    opens: int = 0
    """Number of calls of `open` and `os.open`. Files that torch maps into memory are not counted."""
    reads: int = 0
    """Number of read system calls (read, pread, readv), from the kernel's counter `syscr`. Access to mapped files is
    not counted."""
    num_bytes: int = 0
    """Number of bytes that the read calls returned, from the kernel's counter `rchar`."""


@contextmanager
def count_file_calls() -> Iterator[FileCalls]:
    """Counts file calls inside a `with` block, and yields the counts.

    `opens` is up to date inside the block. `reads` and `num_bytes` are set when the block ends. They come from
    /proc/self/io (Linux), and include all calls of the process during the block.
    """
    calls = FileCalls()
    counting = True

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        # An integer is a descriptor that is open already and gets a file object.
        if counting and event == "open" and not isinstance(arguments[0], int):
            calls.opens += 1

    before = _read_counts()
    overhead = [b - a for a, b in zip(before, _read_counts(), strict=True)]
    before = _read_counts()
    sys.addaudithook(count)  # a hook cannot be removed, so it is silenced instead
    try:
        yield calls
    finally:
        counting = False
        used = [b - a - extra for a, b, extra in zip(before, _read_counts(), overhead, strict=True)]
        calls.reads, calls.num_bytes = used


def _read_counts() -> tuple[int, int]:
    """Returns the number of this process's read calls so far, and the number of bytes that these calls returned."""
    with open(_IO, encoding="ascii") as file:
        counts = dict(line.split(": ") for line in file.read().splitlines())
    return int(counts["syscr"]), int(counts["rchar"])
