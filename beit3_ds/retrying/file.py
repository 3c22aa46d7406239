"""Appends to a file that must be complete in the end, even if writes fail temporarily."""

import os
from collections.abc import Callable
from pathlib import Path

from beit3_ds.atomic_file import atomic_write
from beit3_ds.regular_file import read_regular

_MAX_BYTES = 1 << 32


class RetryingFile:
    """Appends to a file; keeps bytes in memory when a write fails, and writes them with the next bytes.

    A failed write raises no `OSError`. The first error and the recovery are reported. The file is opened for every
    write, so it may be deleted, moved or remounted in between.
    """

    def __init__(self, path: Path, report: Callable[[str], None], *, has_lines: bool = True) -> None:
        """Stores the arguments; does not open the file.

        Args:
            path: path of the file. Each write creates missing folders.
            report: function that takes one line of text. It is called when writing fails, and when writing succeeds
                again.
            has_lines: whether the file consists of lines. With True, an append first adds a newline if the last line
                has none, as after a kill.
        """
        self.path, self._report, self._has_lines = path, report, has_lines
        self._missing = b""
        self._start: int | None = None
        """Size of the file in bytes before the first attempt to append the unwritten bytes; None before any attempt. A
        failed attempt may have appended a part of the unwritten bytes."""
        self._replaces = False
        """Whether the unwritten bytes replace the whole file, instead of being appended."""
        self.has_failed = False
        """Whether the last write failed, so that the file is incomplete."""

    def append(self, content: bytes) -> None:
        """Appends bytes to the file. Earlier bytes that could not be written are tried again first."""
        self._missing += content
        self.retry()

    def replace(self, content: bytes) -> None:
        """Replaces the whole file atomically; discards bytes that are not written yet."""
        self._missing, self._start, self._replaces = content, None, True
        self.retry()

    def retry(self) -> bool:
        """Writes all unwritten bytes; returns whether the file is complete."""
        if not self._missing and not self._replaces:
            return True
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._replaces:
                with atomic_write(self.path.resolve()) as file:
                    file.write(self._missing)
            else:
                self._append_missing()
        except OSError as error:
            if not self.has_failed:
                self._report(
                    f"WARNING: {self.path} cannot be written: {error.strerror}. The run continues and writes the "
                    "missing part once that is possible."
                )
            self.has_failed = True
            return False
        self._missing, self._start, self._replaces = b"", None, False
        if self.has_failed:
            self.has_failed = False
            self._report(f"{self.path} is complete again")
        return True

    def content(self) -> bytes:
        """Returns the file's content, including unwritten bytes; a missing file counts as empty.

        Raises:
            OSError: if an existing file cannot be read, is not a regular file, or has more than 4 GiB.
        """
        if self._replaces:
            return self._missing
        held = read_regular(self.path, _MAX_BYTES) if self.path.exists() else b""
        if not self._missing:
            return held
        if self._start is not None and self._missing.startswith(held[self._start :]):
            held = held[: self._start]
        is_cut = self._has_lines and held and not held.endswith(b"\n") and not self._missing.startswith(b"\n")
        return held + (b"\n" if is_cut else b"") + self._missing

    def _append_missing(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o666)
        try:
            written = self._find_written(descriptor)
            rest = memoryview(self._missing)[written:]
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)  # a network file system may report here that there was no room

    def _find_written(self, descriptor: int) -> int:
        """Returns how many bytes of `_missing` an earlier write, which failed halfway, has already appended to the
        file.
        """
        size = os.fstat(descriptor).st_size
        if self._start is not None and self._start <= size <= self._start + len(self._missing):
            held = os.pread(descriptor, size - self._start, self._start)
            if len(held) == size - self._start and self._missing.startswith(held):
                return len(held)
        is_cut = self._has_lines and size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        if is_cut and not self._missing.startswith(b"\n"):
            self._missing = b"\n" + self._missing
        self._start = size
        return 0
