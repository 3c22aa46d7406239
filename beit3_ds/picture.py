"""Draws the pictures of a run."""

import os
from collections.abc import Iterator
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
