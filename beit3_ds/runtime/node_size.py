"""Measures the memory and the space in /dev/shm that are available to processes on this machine."""

import os
from contextlib import suppress
from pathlib import Path

from beit3_ds.planner import NodeSize

_SHM = "/dev/shm"
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2 and 1


def measure_node() -> NodeSize:
    """Returns this machine's memory and the free space in /dev/shm, in bytes.

    In a container with a lower memory limit, the returned memory is that limit.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or its content is "max"
            memory = min(memory, int(Path(path).read_text(encoding="ascii")))
    shm: int | None = None
    with suppress(OSError):
        status = os.statvfs(_SHM)
        shm = status.f_bavail * status.f_frsize
    return NodeSize(memory=memory, shm=shm, name=f"host {os.uname().nodename}")
