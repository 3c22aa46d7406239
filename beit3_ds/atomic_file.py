"""Writes files atomically: a reader finds the old file or the complete new one."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_LONG_NAME = 107  # bytes; file systems allow 255, of which a host's name may take 64 in a temporary name


def bounded_name(name: str) -> str:
    """Returns a file name of at most 113 bytes, which leaves room for suffixes such as a host name and `.tmp`.

    A name of up to 107 bytes is returned unchanged. A longer name is cut and ends with a digest of the whole name, so
    that two names with the same beginning stay different.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= _LONG_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONG_NAME - 7].decode('utf-8', 'ignore')}~{digest}"


@contextmanager
def atomic_write(path: Path, keep: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to `path` once it is complete.

    After an error, or if `keep` is false, deletes the temporary file instead. So a reader sees the old file or the
    complete new one, even if this process is killed. The permissions of the new file follow the umask.

    Raises:
        OSError: if the file cannot be written; the old file is still there.
    """
    temporary = path.with_name(f"{bounded_name(path.name)}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            if keep:
                file.flush()
                os.fsync(file.fileno())  # otherwise the name could survive a crash without the bytes
        if keep:
            temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # errors of a write or sync do not name the file
            raise OSError(error.errno, f"{error.strerror} (no file was replaced)", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
