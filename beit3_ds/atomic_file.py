"""New files that are whole or absent."""

import hashlib
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_LONG_NAME = 107  # bytes; file systems allow 255, of which a host's name may take 64 in a temporary name


def bounded_name(name: str) -> str:
    """Returns a file's name, shortened to 113 bytes if it is long, so that others can be made of it.

    Of a shortened name a digest of all of it is a part: names that begin alike stay apart.
    """
    encoded = os.fsencode(name)
    if len(encoded) <= _LONG_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return f"{encoded[: _LONG_NAME - 7].decode('utf-8', 'ignore')}~{digest}"


@contextmanager
def written_aside(path: Path, keep: bool = True) -> Iterator[BinaryIO]:
    """Opens a new file that takes the name `path` when all is written, or none if `keep` is false or after an error.

    A reader sees the old file or the whole new one, also after a kill. Its permissions follow the umask.

    Raises:
        OSError: if the file cannot be written; the old one is still there.
    """
    temporary = path.with_name(f"{bounded_name(path.name)}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as file:
            yield file
            if keep:
                file.flush()
                os.fsync(file.fileno())  # a name must not outlive a crash that the bytes do not
        if keep:
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
