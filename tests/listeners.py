"""Finds the addresses and ports at which a process listens."""

import psutil


def listeners(pid: int | None = None) -> list[tuple[str, int]]:
    """Returns the addresses and TCP ports at which a process listens, by default this process."""
    found = psutil.Process(pid).net_connections("tcp")
    return [(entry.laddr.ip, entry.laddr.port) for entry in found if entry.status == psutil.CONN_LISTEN]
