"""Makes `os.write` fail at chosen calls, after it has written a part of the data."""

import errno
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from unittest import mock

from hypothesis import strategies as st

MOMENTS = st.lists(st.none() | st.integers(0, 30), max_size=60)
"""One entry per call of `os.write`: None for a success, or the bytes written before the disk is full."""


@contextmanager
def failing_disk(moments: Iterable[int | None], code: int = errno.ENOSPC) -> Iterator[None]:
    """Makes calls of `os.write` fail as described by `MOMENTS`; later calls succeed.

    As in the operating system, a call that writes a part returns the size of that part, and only the next call fails.
    """
    remaining, write = iter(moments), os.write
    is_full = False

    def fail(descriptor: int, content: bytes) -> int:
        nonlocal is_full
        room = None if is_full else next(remaining, None)
        if is_full or room == 0:
            is_full = False
            raise OSError(code, os.strerror(code))
        if room is None or room >= len(content):
            return write(descriptor, content)
        is_full = True
        return write(descriptor, bytes(content[:room]))

    with mock.patch("os.write", fail):
        yield
