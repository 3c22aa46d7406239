"""Creates and saves matplotlib figures."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beit3_ds.atomic_file import atomic_write


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Returns a matplotlib figure and its subplots, which share the x axis. Needs no display.

    Does not use `pyplot`, because `pyplot` would load the backend that a notebook names in MPLBACKEND.

    Args:
        rows: number of rows of subplots.
        columns: number of columns of subplots.
        size: width and height of the figure in inches.
    """
    with _without_backend_choice():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, sharex=True)


@contextmanager
def _without_backend_choice() -> Iterator[None]:
    """Hides MPLBACKEND in the `with` block, because matplotlib checks its value on import."""
    name = os.environ.pop("MPLBACKEND", None)
    try:
        yield
    finally:
        if name is not None:
            os.environ["MPLBACKEND"] = name


def save_figure(figure: Any, path: Path) -> None:
    """Writes a figure from `new_figure` to a PNG file, atomically.

    Raises:
        OSError: if the file cannot be written.
    """
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
