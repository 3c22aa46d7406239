"""Writes the files of DeepSpeed's CSV monitor. They stay valid tables if a run is resumed or the disk fails.

DeepSpeed's own writer has three faults. It ends the run if the disk is full, writes the header again when a run
resumes, and keeps rows although a resumed run repeats their steps.
"""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from beit3_ds.retrying.file import RetryingFile


class CsvMonitor:
    """Appends logged values, such as losses, to CSV files, one file per name.

    Names of files and columns are those of DeepSpeed's CSV monitor.
    """

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        """Stores the arguments.

        Args:
            folder: folder of the CSV files.
            report: function that receives one line when a file cannot be written, and one when all files are complete
                again.
        """
        self._folder, self._report = folder, report
        self._files: dict[str, RetryingFile] = {}
        self._has_failed = False

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Appends a row (step, value) to the file of each event (name, value, step)."""
        for name, value, step in events:
            table = name.replace("/", "_").replace(" ", "_")
            rows = [[step, value]] if table in self._files else [["step", name.rpartition("/")[2]], [step, value]]
            self._file(table).append(_format(rows))
        if self._has_failed:  # also writes the missing rows of tables without new rows
            self.retry()
        self._report_changes()

    def forget_after(self, step: int) -> None:
        """Deletes the rows of steps after `step`; a resumed run repeats these steps. With -1, deletes all rows."""
        for path in sorted(self._folder.glob("*.csv")):
            rows = _read_own_rows(path)
            if rows is not None:
                header, *rows = rows
                kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
                self._file(path.stem).replace(_format([header, *kept]))
        self._report_changes()

    def retry(self) -> bool:
        """Writes rows that could not be written before, and returns whether all files are complete."""
        for file in self._files.values():
            file.retry()
        self._report_changes()
        return not self._has_failed

    def _file(self, table: str) -> RetryingFile:
        if table not in self._files:
            self._files[table] = RetryingFile(self._folder / f"{table}.csv", _say_nothing)
        return self._files[table]

    def _report_changes(self) -> None:
        """Prints a message if some tables cannot be written any more, or if all tables are complete again.

        There is only one message for all tables, because all tables are on the same disk.
        """
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
    """Ignores messages about a single file, because `CsvMonitor` reports for all files together."""


def _format(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _read_own_rows(path: Path) -> list[list[str]] | None:
    """Returns the rows of a CSV file, header first, or None if this monitor did not write the file."""
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
