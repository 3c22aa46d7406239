"""Writes the CSV files of DeepSpeed's CSV monitor; each stays a valid table if a run is resumed or a disk fails.

DeepSpeed's own writer fails the run on a full disk, writes a header to every file once per process, and keeps the old
rows of steps that a resumed run repeats.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beit3_ds.retrying.file import RetryingFile


class CsvMonitor:
    """Appends the values of named figures to CSV files, one per figure, with DeepSpeed's names of files and columns."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        """Stores the arguments.

        Args:
            folder: folder of the files.
            report: receives a line when the first file cannot be written, and when all files are complete again.
        """
        self._folder, self._report = folder, report
        self._files: dict[str, RetryingFile] = {}
        self._has_failed = False

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Appends a row (step, value) for each event (name, value, step)."""
        for name, value, step in events:
            table = name.replace("/", "_").replace(" ", "_")
            rows = [[step, value]] if table in self._files else [["step", name.rpartition("/")[2]], [step, value]]
            self._file(table).append(_format(rows))
        if self._has_failed:  # writes also the missing rows of tables that have no new ones
            self.retry()
        self._report_changes()

    def forget_after(self, step: int) -> None:
        """Deletes the rows of steps after `step`, because a resumed run repeats these steps; -1 deletes all rows."""
        for path in sorted(self._folder.glob("*.csv")):
            rows = _read_own_rows(path)
            if rows is not None:
                header, *rows = rows
                kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
                self._file(path.stem).replace(_format([header, *kept]))
        self._report_changes()

    def retry(self) -> bool:
        """Writes the rows that are missing; returns whether all files are complete."""
        for file in self._files.values():
            file.retry()
        self._report_changes()
        return not self._has_failed

    def _file(self, table: str) -> RetryingFile:
        if table not in self._files:
            self._files[table] = RetryingFile(self._folder / f"{table}.csv", _say_nothing)
        return self._files[table]

    def _report_changes(self) -> None:
        """Reports once for all files, because one disk holds all of them."""
        failed = [file.path.name for file in self._files.values() if file.has_failed]
        if failed and not self._has_failed:
            self._report(
                f"WARNING: {self._folder / failed[0]} and other tables cannot be written. The run continues and writes "
                "the missing rows once that is possible."
            )
        elif self._has_failed and not failed:
            self._report(f"the tables in {self._folder} are complete again")
        self._has_failed = bool(failed)


def _say_nothing(line: str) -> None:
    """Ignores a line about one file, because `CsvMonitor` reports once for all files."""


def _format(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _read_own_rows(path: Path) -> list[list[str]] | None:
    """Returns the rows of a table that the monitor wrote, header first; None if the file has another origin."""
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file)) or [["step", path.stem]]
    except (OSError, UnicodeDecodeError, csv.Error):
        return None
    header = rows[0]
    is_own = len(header) == 2 and header[0] == "step" and path.stem.endswith(header[1].replace(" ", "_"))
    return rows if is_own else None
