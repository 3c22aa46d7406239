"""Stores the results of a certification as JSON lines, which are appended at once and survive any crash.

A call of `beit3 certify` begins with the line {"call": N, ...}. The line {"section": NAME, "item": ITEM, ...} has the
figures of one measurement, or `"begun": true` when it begins. The line {"section": NAME, "status": STATUS, ...} ends a
section.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Line = dict[str, Any]
"""Content of one line."""

DONE = "done"
"""Status of a section that measured all of its items."""
ABSENT = "absent: "
"""Beginning of the status of a section that needs a package which is not installed; the package's name follows."""
NEEDS_DEVICE = "needs a CUDA device"
"""Status of a section that has no form for a CPU."""


def has_failed(line: Line) -> bool:
    """Returns whether an item began and did not end, raised an error, or is a check that did not pass."""
    return bool(line.get("begun") or line.get("error")) or line.get("passed") is False


class ResultsFile:
    """Appends and reads the lines of one certification."""

    def __init__(self, path: Path) -> None:
        """Stores the path; the first `append` creates the file."""
        self.path = path

    def append(self, line: Line) -> None:
        """Appends a line by one write, and first ends a line that a killed process left incomplete."""
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
            except ValueError:  # the line that a killed process did not complete
                continue
            if isinstance(line, dict):
                yield line

    @property
    def call(self) -> int:
        """Returns the number of the latest call of `beit3 certify` in this file, or 0."""
        return max((line["call"] for line in self.read() if "section" not in line and "call" in line), default=0)

    def failed_sections(self) -> set[str]:
        """Returns the names of the sections with an item whose latest line is a failure."""
        latest = {(line["section"], line["item"]): line for line in self.read() if "item" in line}
        return {section for (section, _), line in latest.items() if has_failed(line)}

    def statuses(self) -> dict[str, str]:
        """Returns the latest status of every section that ended, by name."""
        return {line["section"]: line["status"] for line in self.read() if "status" in line}
