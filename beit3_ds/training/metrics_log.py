"""Keeps the metrics of a run in OUTPUT_DIR/metrics.jsonl, one JSON object per line."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

from beit3_ds.checkpoint.disk import write_whole


class MetricsLog:
    """Appends records and reads them back; each record has a "step"."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        """Appends one record to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill truncated the last line
                    file.write(b"\n")
            file.write(f"{json.dumps(record)}\n".encode())

    def records(self) -> list[dict[str, Any]]:
        """Returns all complete records; ignores other lines, such as a line truncated by a kill."""
        return [record for record in map(_parse, self._lines()) if record is not None]

    def forget_after(self, step: int) -> None:
        """Deletes the records of steps after `step`, because a resumed run repeats these steps.

        Keeps lines that are not valid records.
        """
        lines = self._lines()
        kept = [line for line in lines if (record := _parse(line)) is None or record["step"] <= step]
        if kept != lines:
            write_whole(self.path.resolve(), "".join(f"{line}\n" for line in kept).encode("utf-8", "surrogateescape"))

    def move_aside(self) -> Path | None:
        """Renames the file of an earlier run when a new run starts; returns its new path, or None without a file."""
        if not self._lines():
            return None
        names = (f"{self.path.stem}-{number}{self.path.suffix}" for number in itertools.count(1))
        moved = next(path for name in names if not os.path.lexists(path := self.path.with_name(name)))
        self.path.rename(moved)
        return moved

    def _lines(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_bytes().decode("utf-8", errors="surrogateescape")
        return text.removesuffix("\n").split("\n") if text else []


def _parse(line: str) -> dict[str, Any] | None:
    """Parses one line of the file; returns None if the line is not a valid record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return None
    if record.get("kind") == "heldout":  # the name in version 0.1
        record["kind"] = "validation"
    return record
