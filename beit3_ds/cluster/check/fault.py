"""One thing that is wrong with a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass

CHECKS = (
    *("answer", "python", "torch", "deepspeed", "code"),
    *("GPUs", "disk", "limits", "clock"),
    *("network", "port", "shared", "files"),
)
"""The columns of the table, in its order."""


@dataclass(frozen=True)
class Fault:
    """To be mended before a run starts."""

    host: str
    """Where; empty if it concerns the cluster as a whole."""
    check: str
    """One of CHECKS, or "layout" for what concerns no single host."""
    text: str
    """Value, rule and way out, without the host."""
    is_note: bool = False
    """Whether runs get by all the same: it is told, but nothing need be mended."""

    def __str__(self) -> str:
        return f"{self.host}: {self.text}" if self.host else self.text


def join_names(names: Sequence[str]) -> str:
    """Names of hosts for a sentence: three at most, and how many more."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "none"


def show_bytes(num_bytes: float) -> str:
    """A size to read, e.g. 79.6 GiB."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes / 2**10:.0f} KiB"
