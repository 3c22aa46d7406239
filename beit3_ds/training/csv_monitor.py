"""DeepSpeed's CSV monitor over several starts of one run: one table per file."""

import csv
from pathlib import Path
from typing import Any


def continue_csv_files(monitor: Any, step: int) -> None:
    """Makes a monitor add to the files of earlier starts: no second header, no step twice.

    DeepSpeed writes a header wherever this process has not written one, and keeps rows of steps that are repeated.

    Args:
        monitor: `engine.monitor`, which has a `csv_monitor` on the rank that writes.
        step: updates that are done; rows of later ones are dropped, all of them for -1.
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
