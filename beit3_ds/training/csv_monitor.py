"""Keeps each CSV file of DeepSpeed's monitor a single valid table when a run is resumed."""

import csv
from pathlib import Path
from typing import Any


def continue_csv_files(monitor: Any, step: int) -> None:
    """Makes a monitor append to the files of earlier processes, without a second header or repeated steps.

    By default, DeepSpeed writes a header to every file once per process and keeps rows of steps that are repeated.

    Args:
        monitor: `engine.monitor`, which has a `csv_monitor` on the rank that writes.
        step: number of updates done. Rows of later steps are dropped; -1 drops all rows.
    """
    files = getattr(monitor, "csv_monitor", None)
    if files is None or not files.enabled:
        return
    for path in sorted(Path(files.log_dir).glob("*.csv")):
        rows = _read_own_rows(path)
        if rows is not None:
            _drop_rows_after(path, rows, step)
            files.filenames.append(path.stem)


def _read_own_rows(path: Path) -> list[list[str]] | None:
    """Returns the rows of a table that the monitor wrote, header first; None if the file has another origin."""
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file)) or [["step", path.stem]]
    except (UnicodeDecodeError, csv.Error):
        return None
    header = rows[0]
    is_own = len(header) == 2 and header[0] == "step" and path.stem.endswith(header[1].replace(" ", "_"))
    return rows if is_own else None


def _drop_rows_after(path: Path, rows: list[list[str]], step: int) -> None:
    header, *rows = rows
    kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
    aside = path.with_suffix(".tmp")
    with open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
    aside.replace(path)
