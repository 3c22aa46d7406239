"""Reads files with retries, so that a short failure of the file system does not end a run.

A missing, forbidden or irregular file is an error in the data; the caller handles it. Any other error (EIO, ESTALE,
ETIMEDOUT, EMFILE, ...) is a failure of the file system or the machine. Such a failure is retried. If the retries fail
too, the run ends with an error that names the file.
"""

import errno
import io
import os
import socket
import stat
import time
from collections.abc import Callable
from typing import TypeVar

from beit3_ds.printing import printable
from beit3_ds.storage_error import StorageError

ResultT = TypeVar("ResultT")

FILE_ERRORS = frozenset(
    (
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EACCES,
        errno.EPERM,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENXIO,  # the path is a socket
        errno.EINVAL,
    )
)
"""Error numbers that concern one file, not the file system."""

_PAUSES = (0.1, 0.4, 1.5)  # seconds before attempts 2 to 4; about the time of a server's failover
_BUFFER_BYTES = 1 << 20


def read_with_retries(read: Callable[[], ResultT], path: str, file_errors: frozenset[int] = FILE_ERRORS) -> ResultT:
    """Returns the result of `read`. If `read` fails, it is called again, up to three times within about two seconds.

    Args:
        read: function that opens and reads the file. It must reopen the file in each call, because a descriptor can
            become stale.
        path: path of the file, for messages.
        file_errors: error numbers to raise without a retry, because the caller handles them.

    Raises:
        OSError: if the error's number is in `file_errors`, or if the error has no number. Errors of decompressors have
            none.
        StorageError: if the last attempt fails too.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno is None or error.errno in file_errors:
                raise
            if pause is None:
                raise storage_error(path, error, len(_PAUSES) + 1) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def storage_error(path: str, error: OSError, attempts: int) -> StorageError:
    """Builds the `StorageError` that ends a run because `path` cannot be read. The message contains the number of
    attempts if there was more than one.
    """
    times = "" if attempts == 1 else f" in {attempts} attempts"
    return StorageError(
        f"data: host {socket.gethostname()} cannot read {printable(path)}{times}: {error.strerror or error}. The "
        "file system fails or is no longer mounted; no record was counted as broken. Repair it and start the same "
        "command again: it resumes from the newest checkpoint."
    )


def open_for_reading(path: str) -> io.BufferedReader:
    """Opens a file for buffered reading; retries failed reads as `read_with_retries` does.

    Raises:
        OSError: if the file is missing, forbidden or not a regular file.
        StorageError: if all retries fail. Reads of the returned file may raise this error too.
    """
    return io.BufferedReader(_RetryingFile(path), _BUFFER_BYTES)


class _RetryingFile(io.RawIOBase):
    """Reads a file with retries; reopens the file after each failed read."""

    def __init__(self, path: str) -> None:
        self._path, self._position = path, 0
        self._file: io.FileIO | None = None
        read_with_retries(self._open, path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += read_with_retries(lambda: os.fstat(self._open().fileno()).st_size, self._path)
        elif whence == os.SEEK_CUR:
            offset += self._position
        self._position = offset
        return offset

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        count = read_with_retries(lambda: self._read_once(buffer), self._path)
        self._position += count
        return count

    def close(self) -> None:
        self._drop()
        super().close()

    def _read_once(self, buffer: memoryview) -> int:
        try:
            file = self._open()
            file.seek(self._position)
            return file.readinto(buffer) or 0
        except OSError:
            self._drop()
            raise

    def _open(self) -> io.FileIO:
        if self._file is None:
            file = open(self._path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115, closed by close()
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                file.close()
                raise OSError(errno.EINVAL, "not a regular file", self._path)
            self._file = file
        return self._file

    def _drop(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            file.close()


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe waits for its other end
