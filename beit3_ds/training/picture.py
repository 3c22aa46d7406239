"""Pictures and pages that a run leaves behind: a run never fails for want of one."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import written_aside


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Returns a matplotlib figure and its axes, which share the horizontal one; needs no backend and no display.

    `pyplot` is not used: it would load the backend that MPLBACKEND names, which a notebook sets to one of its own.

    Args:
        rows: of axes.
        columns: of axes.
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
    """Hides MPLBACKEND, whose name matplotlib checks on import even where no backend is loaded."""
    name = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure of `new_figure` as a PNG, whole or not at all.

    Raises:
        OSError: if the file cannot be written.
    """
    with written_aside(path) as file:
        figure.savefig(file, format="png", dpi=110)


def try_to_write(path: Path, write: Callable[[Path], None], report: Callable[[str], None] = print) -> bool:
    """Writes a picture or page, or says in one line why it is missing.

    Args:
        path: of the new file.
        write: writes it; whatever it raises is reported.
        report: receives that line.

    Returns:
        Whether the file was written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path)
    except Exception as error:  # a missing font, a full disk or a broken library must not fail a finished run
        why = " ".join(str(error).split())
        report(f"WARNING: {path} was not written: {type(error).__name__}: {why}")
        return False
    return True
