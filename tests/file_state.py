"""What a write changes of a file, for tests that expect no write."""

import os
from pathlib import Path


def file_state(path: Path) -> tuple[int, ...]:
    """Returns type and mode, inode, device, links, owner, size and the time of the last write of `path` itself.

    The time of the last access is left out: reading a link's target changes it.
    """
    state = os.lstat(path)
    return (
        state.st_mode,
        state.st_ino,
        state.st_dev,
        state.st_nlink,
        state.st_uid,
        state.st_gid,
        state.st_size,
        state.st_mtime_ns,
    )
