"""Draws the loss terms of a run over its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from beit3_ds.picture import new_figure, save_figure
from beit3_ds.tasks import Term


def plot_losses(records: list[dict[str, Any]], baselines: dict[str, float], terms: Sequence[Term], path: Path) -> None:
    """Draws each loss term in training and validation to a PNG file, with a dashed line for the term's baseline.

    Args:
        records: metrics of the run.
        baselines: best possible loss without looking at the input, by term.
        terms: loss terms of the task.
        path: path of the PNG file to write.
    """
    columns = min(2, len(terms))
    rows = -(-len(terms) // columns)
    figure, axes = new_figure(rows, columns, (5 * columns, 3.5 * rows))
    grid = np.atleast_2d(axes).reshape(rows, columns)
    for axis, term in zip(grid.flat, terms, strict=False):
        for kind, style in (
            ("train", {"label": "training", "alpha": 0.6, "linewidth": 1}),
            ("validation", {"label": "validation", "marker": "o", "markersize": 4}),
        ):
            points = [(r["step"], r[term.name]) for r in records if r["kind"] == kind and term.name in r]
            if points:
                axis.plot(*zip(*points, strict=True), **style)
        if term.name in baselines:
            axis.axhline(baselines[term.name], linestyle="--", color="gray", label="unigram entropy")
        axis.set_title(term.title)
        axis.set_ylabel(term.unit)
        axis.grid(alpha=0.3)
    for axis in grid.flat:
        if axis.get_legend_handles_labels()[0]:  # a kind of sample may be neither trained nor evaluated
            axis.legend()
            break
    for axis in grid[-1]:
        axis.set_xlabel("step")
    save_figure(figure, path)
