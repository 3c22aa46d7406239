"""Writes files atomically: readers see either the old file or the complete new file."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_LONG_NAME = 107  # bytes; file systems allow 255, and a temporary name adds a host name of up to 64


def bounded_name(name: str) -> str:
    """Returns a file name that leaves room for suffixes such as a host name and `.tmp`; file systems allow 255 bytes.

    If `name` has at most 107 bytes, returns it unchanged. A longer name is cut to 100 bytes or a little less, and "~"
    and 12 characters of a digest of the whole name are appended. Names with equal beginnings therefore stay different.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= _LONG_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONG_NAME - 7].decode('utf-8', 'ignore')}~{digest}"


@contextmanager
def atomic_write(path: Path, keep: bool = True) -> Iterator[BinaryIO]:
    """Opens a temporary file for writing, and renames it to `path` when the `with` block ends.

    Readers see either the old file or the complete new file, even if this process is killed. After an error, the
    temporary file is deleted. The permissions of the new file follow the umask.

    Args:
        path: path of the file.
        keep: False deletes the temporary file instead of renaming it.

    Raises:
        OSError: if the file cannot be written; the old file is unchanged.
    """
    temporary = path.with_name(f"{bounded_name(path.name)}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            if keep:
                file.flush()
                os.fsync(file.fileno())  # otherwise a crash could leave the new name without the content
        if keep:
            temporary.replace(path)
    except OSError as error:
        if error.filename is None:  # errors of a write or sync do not name the file
            raise OSError(error.errno, f"{error.strerror} (no file was replaced)", str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
