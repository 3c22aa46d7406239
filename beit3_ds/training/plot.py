"""A picture of the run: the four loss terms over the steps."""

from pathlib import Path
from typing import Any

from beit3_ds.batch import LOSS_TERMS
from beit3_ds.training.picture import new_figure, save_figure

_TITLES = {
    "image_mim": "images: masked patches",
    "text_mlm": "texts: masked tokens",
    "pair_mim": "pairs: masked patches",
    "pair_mlm": "pairs: masked tokens",
}


def plot_losses(records: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    """Draws each loss term in training and held out, with the unigram entropy as a dashed line.

    Args:
        records: the run's metrics_log.
        baselines: unigram entropy of each term, in nats.
        path: the PNG to write.
    """
    figure, axes = new_figure(2, 2, (10, 7))
    for axis, term in zip(axes.flat, LOSS_TERMS, strict=True):
        for kind, style in (
            ("train", {"alpha": 0.6, "linewidth": 1}),
            ("validation", {"marker": "o", "markersize": 4}),
        ):
            points = [(r["step"], r[term]) for r in records if r["kind"] == kind and term in r]
            if points:
                axis.plot(
                    *zip(*points, strict=True), label={"train": "training", "validation": "held out"}[kind], **style
                )
        if term in baselines:
            axis.axhline(baselines[term], linestyle="--", color="gray", label="unigram entropy")
        axis.set_title(_TITLES[term])
        axis.set_ylabel("cross entropy (nats)")
        axis.grid(alpha=0.3)
    for axis in axes.flat:
        if axis.get_legend_handles_labels()[0]:  # a stream may be neither trained nor evaluated
            axis.legend()
            break
    for axis in axes[1]:
        axis.set_xlabel("step")
    save_figure(figure, path)
