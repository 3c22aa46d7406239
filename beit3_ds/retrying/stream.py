"""Defines a byte stream whose failed writes do not end the program, for standard output and log files."""

import contextlib
import errno
import io
import os
import select
import threading
from collections.abc import Callable
from typing import Any

_CHUNK_BYTES = 1 << 20
_FULL_PIPE_SECONDS = 5.0  # longest wait of `finish` for the reader of a pipe or terminal that does not block
_NOT_OPEN = -1


class RetryingStream(io.RawIOBase):
    """Writes bytes in order. If a write fails, its bytes are kept in memory, and are written before any later bytes.

    A full disk, a read-only mount or a closed terminal raises no error. If the reader of a pipe has ended, all later
    bytes are discarded.

    Attributes:
        reports_closed_pipe: whether to call the constructor's function `report` when the reader of a pipe has ended;
            False by default.
    """

    def __init__(
        self, open_descriptor: Callable[[], int], report: Callable[[OSError], None], limit: int = 1 << 24
    ) -> None:
        """Stores the arguments; the first write opens the descriptor.

        Args:
            open_descriptor: function that returns the file descriptor. If it raises an `OSError`, the write has failed,
                and the next write calls it again.
            report: function that takes an error. It is called for the first error, and for the first error after each
                recovery. A full non-blocking pipe is never reported. A pipe whose reader has ended is reported only if
                the attribute `reports_closed_pipe` is True. No lock is held during the call.
            limit: maximum bytes kept in memory. Further bytes are dropped. Later, a line with the number of dropped
                bytes is written to the stream.
        """
        super().__init__()
        self._open, self._report, self._limit = open_descriptor, report, limit
        self._descriptor = _NOT_OPEN
        self._missing, self._num_dropped = bytearray(), 0
        self._error: OSError | None = None
        self.reports_closed_pipe = False
        self._pid = os.getpid()
        # Reentrant, unlike a `BufferedWriter`'s lock: signal handlers print too, and another stream may report here.
        self._lock = threading.RLock()

    @property
    def error(self) -> OSError | None:
        """Returns the error of the last write; None if everything is written."""
        return self._error

    @property
    def has_reader(self) -> bool:
        """Returns False for a pipe whose reader has ended, otherwise True."""
        return not isinstance(self._error, BrokenPipeError)

    @property
    def num_missing(self) -> int:
        """Returns the number of unwritten bytes, including dropped bytes; 0 for a pipe whose reader has ended."""
        return len(self._missing) + self._num_dropped

    def writable(self) -> bool:
        """Returns True, as `io.IOBase` requires for output streams."""
        return True

    def fileno(self) -> int:
        """Returns the file descriptor, for code that writes to it directly."""
        if self._descriptor < 0:
            self._descriptor = self._open()
        return self._descriptor

    def isatty(self) -> bool:
        """Returns whether the stream is a terminal."""
        return os.isatty(self.fileno())

    def write(self, data: Any) -> int:
        """Writes earlier unwritten bytes, and then `data`. Always returns the length of `data`.

        Bytes that cannot be written stay in memory. However, `data` is dropped in three cases. First, the reader of a
        pipe has ended. Second, earlier bytes were dropped, and the notice with their number has not been written yet.
        Third, earlier bytes are unwritten, and together with `data` they exceed the limit.
        """
        content = bytes(data)
        with self._lock:
            self._forget_after_fork()
            if not self.has_reader:
                return len(content)
            if self._num_dropped or (self._missing and len(self._missing) + len(content) > self._limit):
                self._num_dropped += len(content)
            else:
                self._missing += content
        self.retry()
        return len(content)

    def retry(self) -> bool:
        """Tries to write all unwritten bytes; returns whether everything is written."""
        with self._lock:
            before = self._error
            if before is None or self.has_reader:
                self._error = self._write_missing()
            error = self._error
        if error is not None and before is None and self._is_news(error):
            with contextlib.suppress(Exception):  # the report's own stream may have failed too
                self._report(error)
        return error is None

    def finish(self) -> None:
        """Tries a last time to write all unwritten bytes.

        While a non-blocking pipe is full, waits for its reader. Gives up when the pipe stays full for five seconds.
        """
        if not self.retry() and isinstance(self._error, BlockingIOError):
            with contextlib.suppress(OSError, ValueError):
                while select.select([], [self._descriptor], [], _FULL_PIPE_SECONDS)[1] and not self.retry():
                    pass

    def release(self) -> None:
        """Closes the file descriptor if it is open."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = _NOT_OPEN

    def _is_news(self, error: OSError) -> bool:
        if isinstance(error, BrokenPipeError):
            return self.reports_closed_pipe
        return not isinstance(error, BlockingIOError)

    def _write_missing(self) -> OSError | None:
        try:
            while self._missing or self._num_dropped:
                if not self._missing:
                    self._missing += f"\n[{self._num_dropped} bytes of output are missing here]\n".encode()
                    self._num_dropped = 0
                del self._missing[: os.write(self.fileno(), bytes(self._missing[:_CHUNK_BYTES]))]
        except OSError as error:
            if error.errno == errno.EPIPE:
                self._missing.clear()
                self._num_dropped = 0
            return error
        return None

    def _forget_after_fork(self) -> None:
        """Discards unwritten bytes in a forked child, because the parent process writes them."""
        if self._pid != os.getpid():
            self._pid, self._num_dropped = os.getpid(), 0
            self._missing.clear()
