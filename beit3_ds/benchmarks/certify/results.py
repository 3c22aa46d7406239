"""Stores the results of `beit3 certify` as JSON lines.

Each line is written immediately, so that it survives a crash. A line {"call": N, ...} marks the start of a call of
`beit3 certify`. A line {"section": NAME, "item": ITEM, "begun": true} marks the start of a measurement. A line
{"section": NAME, "item": ITEM, ...} contains the figures of the measurement. A line {"section": NAME, "status":
STATUS, ...} marks the end of a section.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""Content of one JSON line."""

CACHE_ITEM = "Triton cache"
"""Name of the entry with two numbers: how many kernels a process found in Triton's cache, and how many it compiled."""

DONE = "done"
"""Status of a section that has run all its measurements."""
ABSENT = "absent: "
"""Start of the status of a section that needs a missing package. The name of the package follows."""
NEEDS_DEVICE = "needs a CUDA device"
"""Status of a section that cannot run on a CPU."""


def has_failed(line: Line) -> bool:
    """Returns whether the line shows a measurement that crashed, raised an error, or did not pass its check."""
    return bool(line.get("begun") or line.get("error")) or line.get("passed") is False


def describe_cache(lines: Sequence[Line], section: str) -> str:
    """Returns a text that tells how many of a section's kernels were found in Triton's cache, and how many were
    compiled.

    The text is empty if the section launched no kernels.
    """
    own = (line for line in lines if line.get("section") == section and line.get("item") == CACHE_ITEM)
    last = {(line["call"], line["process"]): line for line in own}.values()  # the counts of a process only grow
    if not last:
        return ""
    hits, misses = (sum(line[name] for line in last) for name in ("hits", "misses"))
    return f"{hits} cached, {misses} compiled"


class ResultsFile:
    """Appends lines to the results file of one certification, and reads the lines."""

    def __init__(self, path: Path) -> None:
        """Stores the path of the results file; the first `append` creates the file."""
        self.path = path

    def append(self, line: Line) -> None:
        """Appends one line with a single write.

        If a killed process left the last line incomplete, ends that line first.
        """
        descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            is_cut = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            os.write(descriptor, ("\n" * is_cut + json.dumps(line, default=str) + "\n").encode())
        finally:
            os.close(descriptor)

    def read(self) -> Iterator[Line]:
        """Yields all complete lines."""
        if not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # a line that a killed process left incomplete
                continue
            if isinstance(line, dict):
                yield line

    @property
    def call(self) -> int:
        """Returns the number of the latest call of `beit3 certify` in this file; 0 if there was no call."""
        return max((line["call"] for line in self.read() if "section" not in line and "call" in line), default=0)

    def failed_sections(self) -> set[str]:
        """Returns the names of the sections with a measurement that failed when it was last made."""
        latest = {(line["section"], line["item"]): line for line in self.read() if "item" in line}
        return {section for (section, _), line in latest.items() if has_failed(line)}

    def statuses(self) -> dict[str, str]:
        """Returns the latest status of each section that has ended, by the section's name."""
        return {line["section"]: line["status"] for line in self.read() if "status" in line}
