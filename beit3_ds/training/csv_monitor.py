"""Keeps the files of DeepSpeed's CSV monitor as one table each over several starts of a run."""

import csv
from pathlib import Path
from typing import Any


def continue_csv_files(monitor: Any, step: int) -> None:
    """Makes a monitor append to the files of earlier starts, without a second header or repeated steps.

    DeepSpeed writes a header into every file once per process, and keeps old rows of steps that are repeated.

    Args:
        monitor: `engine.monitor`, which has a `csv_monitor` on the rank that writes.
        step: number of updates done; rows of later steps are dropped, and all rows for -1.
    """
    files = getattr(monitor, "csv_monitor", None)
    if files is None or not files.enabled:
        return
    for path in sorted(Path(files.log_dir).glob("*.csv")):
        _drop_rows_after(path, step)
        files.filenames.append(path.stem)


def _drop_rows_after(path: Path, step: int) -> None:
    with open(path, newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [["step", path.stem]]
    kept = [row for row in rows if row and row[0].isdigit() and int(row[0]) <= step]
    aside = path.with_suffix(".tmp")
    with open(aside, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *kept])
    aside.replace(path)
