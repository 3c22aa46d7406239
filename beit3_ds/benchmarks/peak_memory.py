"""The most memory that a process had at once, as the kernel counted it (Linux)."""

import runpy
import sys
from pathlib import Path


def peak_bytes() -> int:
    """The largest resident size of this process, pages of mapped files included, since its start or `reset_peak`."""
    return status_bytes("self", "VmHWM")


def reset_peak() -> None:
    """Lets the kernel count from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def status_bytes(pid: int | str, field: str) -> int:
    """A size from a process's status file; 0 of a process that has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def main(result_path: str, module: str, *arguments: str) -> None:
    """Runs a module as `python -m` does, and writes its peak to a file."""
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    Path(result_path).write_text(str(peak_bytes()))


if __name__ == "__main__":
    main(*sys.argv[1:])
