"""Describes one fault of a cluster, and formats names and sizes for its message."""

from collections.abc import Sequence
from dataclasses import dataclass

CHECKS = (
    *("answer", "python", "torch", "deepspeed", "code"),
    *("GPUs", "disk", "limits", "clock"),
    *("network", "port", "shared", "files"),
)
"""Names of the checks, in the order of the columns in the table of `beit3 check-cluster`."""


@dataclass(frozen=True)
class Fault:
    """Describes one fault of a node or of the cluster, or a note if runs also work without a fix."""

    host: str
    """Host with the fault; empty if it concerns the whole cluster."""
    check: str
    """One of `CHECKS`, or "layout" for a fault that concerns no single host."""
    text: str
    """Message with the faulty value, the rule and a way out, without the host's name."""
    is_note: bool = False
    """Whether the fault is only a note: it is printed, but runs work without a fix."""

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


def join_names(names: Sequence[str]) -> str:
    """Joins host names for a sentence; shortens more than four names to three and a number."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "none"


def show_bytes(num_bytes: float) -> str:
    """Formats a number of bytes for people, such as 79.6 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"
