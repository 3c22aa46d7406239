"""Stores the metrics of a run in OUTPUT_DIR/metrics.jsonl, one JSON object per line."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beit3_ds.retrying.file import RetryingFile
from beit3_ds.untrusted_json import check_count, check_object, parse_untrusted_json


class MetricsLog:
    """Appends records, each with a "step", to a file and reads them back.

    A failing disk does not end the run. Records that cannot be written stay in memory, and are written with a later
    record or by `retry`.
    """

    def __init__(self, path: Path, report: Callable[[str], None] = print) -> None:
        """Stores the arguments.

        Args:
            path: path of the file.
            report: function that receives one line when writing fails, and one when it succeeds again.
        """
        self.path, self._report = path, report
        self._file = RetryingFile(path, report)

    def append(self, record: dict[str, Any]) -> None:
        """Appends one record to the file, or keeps it in memory if the file cannot be written."""
        self._file.append(f"{json.dumps(record)}\n".encode())

    def retry(self) -> bool:
        """Writes the records that are missing in the file, and returns whether the file is complete."""
        return self._file.retry()

    def records(self) -> list[dict[str, Any]]:
        """Returns all valid records, including those that could not be written yet.

        Lines that are not valid records are ignored, such as a last line that was cut off when the process was killed.
        """
        return [record for record in map(_parse, self._lines()) if record is not None]

    def figures(self) -> list[dict[str, Any]]:
        """Returns the "step", the "kind" (such as "train") and all numbers of each record. Skips records without a
        "kind".
        """
        records = [record for record in self.records() if isinstance(record.get("kind"), str)]
        return [
            {
                key: value
                for key, value in record.items()
                if key == "kind" or (type(value) in (int, float) and key.isprintable())
            }
            for record in records
        ]

    def forget_after(self, step: int) -> None:
        """Deletes the records of steps after `step`; a resumed run repeats these steps.

        Lines that are not valid records are kept.
        """
        lines = self._lines()
        kept = [line for line in lines if (record := _parse(line)) is None or record["step"] <= step]
        if kept != lines:
            self._file.replace("".join(f"{line}\n" for line in kept).encode("utf-8", "surrogateescape"))

    def move_aside(self) -> Path | None:
        """Renames the file of an earlier run when a new run starts, and returns the new path.

        Returns None if there is no such file. If the file cannot be renamed, reports a warning and returns None; new
        records then follow the old ones.
        """
        if not self._lines():
            return None
        names = (f"{self.path.stem}-{number}{self.path.suffix}" for number in itertools.count(1))
        moved = next(path for name in names if not os.path.lexists(path := self.path.with_name(name)))
        try:
            self.path.rename(moved)
        except OSError as error:
            self._report(f"WARNING: {self.path} of an earlier run cannot be renamed: {error.strerror}")
            return None
        return moved

    def _lines(self) -> list[str]:
        try:
            text = self._file.content().decode(errors="surrogateescape")
        except OSError as error:
            self._report(f"WARNING: {self.path} cannot be read: {error.strerror or error}")
            return []
        return text.removesuffix("\n").split("\n") if text else []


def _parse(line: str) -> dict[str, Any] | None:
    """Parses one line of the file, and returns None if the line is not a valid record."""
    try:
        record: dict[str, Any] = check_object(parse_untrusted_json(line, accepts_constants=True))
        check_count(record["step"])
    except (ValueError, KeyError):
        return None
    if record.get("kind") == "heldout":  # the name in version 0.1
        record["kind"] = "validation"
    return record
