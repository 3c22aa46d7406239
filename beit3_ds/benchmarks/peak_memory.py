"""Reads a process's peak memory from the Linux kernel."""

import runpy
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Returns this process's peak resident memory in bytes, since its start or the last `reset_peak`.

    Mapped files are included.
    """
    return status_bytes("self", "VmHWM")


def reset_peak() -> None:
    """Sets this process's peak memory, as the Linux kernel records it, to the current resident memory."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(pid: int | str, field: str) -> int:
    """Returns a size such as "VmHWM" from a process's status file, in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main(result_path: str, module: str, *arguments: str) -> None:
    """Runs a module as `python -m` does, and writes this process's peak memory in bytes to a file."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    Path(result_path).write_text(str(peak_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])
