"""Writes the pictures and pages of a run; a run does not fail if one cannot be written."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Returns a matplotlib figure and its subplots, which share the x axis; needs no backend and no display.

    `pyplot` is not used, because it loads the backend in MPLBACKEND, which notebooks set.

    Args:
        rows: rows of subplots.
        columns: columns of subplots.
        size: width and height in inches.
    """
    with _without_backend_choice():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=True)


@contextmanager
def _without_backend_choice() -> Iterator[None]:
    """Hides MPLBACKEND, because matplotlib checks its value on import even if it loads no backend."""
    name = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure of `new_figure` as a PNG file, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)


def try_to_write(path: Path, write: Callable[[Path], None], report: Callable[[str], None] = print) -> bool:
    """Writes a picture or page; if that fails, reports the reason in one line.

    Args:
        path: path of the new file.
        write: writes the file; any exception is reported.
        report: receives the line.

    Returns:
        True if the file was written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except Exception as error:  # a missing font, a full disk or a broken library must not fail a finished run
        why = " ".join(str(error).split())
        report(f"WARNING: {path} was not written: {type(error).__name__}: {why}")
        return False
    return True
