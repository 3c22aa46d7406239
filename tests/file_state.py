"""Describes a file, for tests that expect no write to it."""

import os
from pathlib import Path


def file_state(path: Path) -> tuple[int, ...]:
    """Returns mode, inode, device, links, owner, group, size and modification time of `path`; does not follow a link.

    The access time is left out, because reading a link's target changes it.
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
