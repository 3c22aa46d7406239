"""Finds files with long unwritten gaps. A gap takes no disk space and reads as zeros."""

import errno
import os

from beit3_ds.data.files.reading import read_with_retries

_LONG = 1 << 26
_MOST_GAPS = 1000


def check_has_no_gap(path: str) -> None:
    """Checks that a file has no large gap, which is a range of bytes that was never written.

    Reading a gap of terabytes takes hours. Gaps of at most 64 MiB in total are accepted, unless the file has a thousand
    gaps or more. The check passes on a file system that does not report gaps.

    Raises:
        ValueError: if the gaps have more than 64 MiB in total, or if there are a thousand or more.
        OSError: if the file cannot be opened.
        StorageError: if the file system fails.
    """
    size = read_with_retries(lambda: os.stat(path).st_size, path)
    if size <= _LONG:
        return
    missing = read_with_retries(lambda: _count_missing(path, size), path)
    if missing > _LONG:
        raise ValueError(f"at least {missing:,} of its {size:,} bytes were never written: copy it again")


def next_written(descriptor: int, position: int, size: int) -> int:
    """Returns the first position at or after `position` that is not in a gap.

    If only a gap follows, returns `size`, the position of the file's end. If the file system does not report gaps,
    returns `position`.
    """
    try:
        return os.lseek(descriptor, position, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return size
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # the file system does not report gaps
            return position
        raise


def _count_missing(path: str, size: int) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        position = missing = 0
        for _ in range(_MOST_GAPS):
            written = next_written(descriptor, position, size)
            missing += written - position
            if written >= size or missing > _LONG:
                return missing
            position = os.lseek(descriptor, written, os.SEEK_HOLE)
            if position >= size:
                return missing
        return size  # a text file never has so many gaps
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENXIO):
            return 0
        raise
    finally:
        os.close(descriptor)
