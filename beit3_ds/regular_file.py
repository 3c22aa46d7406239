"""Opens regular files only, so that an untrusted path cannot make the program wait for a pipe."""

import os
import stat
from pathlib import Path


def open_regular(path: str | Path, *, follow_links: bool = True) -> int:
    """Opens a regular file for reading, and returns the file descriptor.

    Args:
        path: path of the file.
        follow_links: whether the last part of the path may be a symbolic link.

    Raises:
        OSError: if the file does not exist, or is a folder, pipe, socket or device. Also if it is a symbolic link and
            `follow_links` is false.
    """
    links = 0 if follow_links else os.O_NOFOLLOW
    # Opening a pipe would wait for its other end.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | links)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is not a regular file")
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: str | Path, limit: int, *, follow_links: bool = True) -> bytes:
    """Returns the content of a regular file.

    Args:
        path: path of the file.
        limit: maximum size in bytes.
        follow_links: whether the last part of the path may be a symbolic link.

    Raises:
        OSError: if the file is larger than `limit`, does not exist, is a folder, pipe, socket or device, or is a
            symbolic link while `follow_links` is false.
    """
    with open(open_regular(path, follow_links=follow_links), "rb") as file:
        is_longer = os.fstat(file.fileno()).st_size > limit
        data = b"" if is_longer else file.read(limit + 1)
    if is_longer or len(data) > limit:
        raise OSError(f"{path} has more than {limit} bytes")
    return data
