"""Tracks the processes that DeepSpeed's launcher starts on this machine, and kills those that do not end in time.

`beit3 launch` never sends SIGTERM or SIGINT to DeepSpeed's launcher. After either signal, the launcher would run `pkill
-f` on every host.
"""

import contextlib
import os
import signal
from pathlib import Path
from typing import NamedTuple


class ProcessId(NamedTuple):
    """Identifies a process by id and start time, because the system may later reuse the id."""

    pid: int
    start_time: int
    """Start time of the process, in clock ticks since the machine booted."""


class ProcessTree:
    """Tracks some root processes, and those of their descendants that `watch` has found."""

    def __init__(self, roots: list[int]) -> None:
        """Records the root processes that still run.

        Args:
            roots: ids of child processes of this process. The caller must not have waited for the end of any of them:
                after such a wait, the system may reuse the id.
        """
        table = _read_table()
        self._found = {ProcessId(pid, table[pid][1]): 0 for pid in roots if pid in table}  # value: depth below a root

    def watch(self) -> None:
        """Records new descendants of the recorded processes. A process whose parent has already ended is not found."""
        table = _read_table()
        children: dict[int, list[int]] = {}
        for pid, (parent, _) in table.items():
            children.setdefault(parent, []).append(pid)
        left = [(found, depth) for found, depth in self._found.items() if table.get(found.pid, (0, 0))[1] == found[1]]
        while left:
            found, depth = left.pop()
            for pid in children.get(found.pid, ()):
                child = ProcessId(pid, table[pid][1])
                if child not in self._found:
                    self._found[child] = depth + 1
                    left.append((child, depth + 1))

    def kill(self) -> list[int]:
        """Kills all recorded processes that still run, children first; returns the ids of the killed processes."""
        self.watch()
        return [
            found.pid for found in sorted(self._found, key=lambda found: -self._found[found]) if kill_process(found)
        ]


def kill_process(process: ProcessId) -> bool:
    """Kills one process; returns whether it was still running."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    try:
        if _stat(process.pid) != process:  # the open descriptor keeps the number from being given to another process
            return False
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            return True
        return False
    finally:
        os.close(pidfd)


def _read_table() -> dict[int, tuple[int, int]]:
    """Returns the parent id and start time of every process on this machine, by process id."""
    table = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and (fields := _fields(int(path.name))):
            table[int(path.name)] = (int(fields[1]), int(fields[19]))
    return table


def _stat(pid: int) -> ProcessId | None:
    fields = _fields(pid)
    return ProcessId(pid, int(fields[19])) if fields else None


def _fields(pid: int) -> list[str]:
    """Returns the fields of /proc/PID/stat, starting with the state; an empty list if the process has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
    return [] if fields[0] in "ZX" else fields
