"""Describes faults of a cluster, and formats host names and sizes for messages about faults."""

from collections.abc import Sequence
from dataclasses import dataclass

CHECKS = (
    *("answer", "python", "torch", "deepspeed", "code"),
    *("GPUs", "disk", "limits", "clock"),
    *("network", "port", "shared", "files"),
)
"""Names of the checks of `beit3 check-cluster`, in the order of the table's columns."""


@dataclass(frozen=True)
class Fault:
    """Describes one fault of a node or of the whole cluster."""

    host: str
    """Name of the faulty host; empty if the fault concerns the whole cluster."""
    check: str
    """Name of the check that found the fault, from `CHECKS`; or "layout" if the run cannot use one rank per slot of the
    hostfile."""
    text: str
    """Message without the host's name: the faulty value, the rule, and how to fix the fault."""
    is_note: bool = False
    """Whether the fault is only a note, which is printed but does not prevent a run."""

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


def join_names(names: Sequence[str]) -> str:
    """Joins host names for a sentence; more than four names are shortened to the first three and a count."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "none"


def show_bytes(num_bytes: float) -> str:
    """Formats a number of bytes with a unit, such as 79.6 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"
