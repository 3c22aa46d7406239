"""Writes the result files of a segmentation evaluation: class table, confusion matrix, label maps and a page."""

import csv
import functools
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from beit3_ds.atomic_file import atomic_write
from beit3_ds.data.samples import Stream
from beit3_ds.picture import new_figure, save_figure
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.tasks.result_page import ShownSample, write_result_page
from beit3_ds.tasks.segmentation.confusion import Confusion
from beit3_ds.tasks.segmentation.evaluation import SegmentedImages, ShownImage, picture
from beit3_ds.tasks.segmentation.pictures import color_labels, draw_labels
from beit3_ds.tasks.segmentation.samples import SegmentationSamples

CLASSES, CONFUSION, PAGE, PREDICTIONS = "classes.csv", "confusion.png", "segmentation.html", "predictions"
"""Names of the class table, the picture of the confusion matrix, the result page, and the folder of label maps."""

_MOST_NAMED = 40  # classes whose names fit beside the picture


def write_results(
    result: SegmentedImages,
    metrics: Mapping[str, float],
    stream: Stream,
    names: Sequence[str],
    folder: ResultFolder,
) -> None:
    """Writes the result files of an evaluation; without labels, writes no class table and no confusion matrix.

    Args:
        result: results over all ranks. If `result.shown` is empty, no HTML page is written.
        metrics: metrics of the split, for the HTML page; empty for a split without labels.
        stream: images of the split.
        names: name of each class.
        folder: folder to write to.
    """
    if metrics:
        write_tables(result.confusion, names, folder)
    for sample_index, data in result.label_maps:
        folder.write(f"{PREDICTIONS}/{_stem(stream, sample_index)}.png", functools.partial(_write_bytes, data=data))
    if result.shown:
        shown = functools.partial(_shown_samples, result.shown, stream, names)
        folder.write(PAGE, lambda path: write_result_page(path, "Segmentation", metrics, shown(), _note(result)))


def write_tables(confusion: Confusion, names: Sequence[str], folder: ResultFolder) -> None:
    """Writes the class table and the picture of the confusion matrix.

    Args:
        confusion: counted pixels, at least one.
        names: name of each class.
        folder: folder to write to.
    """
    folder.write(CLASSES, functools.partial(_write_classes, confusion=confusion, names=names))
    folder.write(CONFUSION, functools.partial(_draw_confusion, confusion=confusion, names=names))


def class_table(confusion: Confusion, names: Sequence[str]) -> list[dict[str, str | int | float]]:
    """Returns one row per class: name, intersection over union, accuracy, true pixels and predicted pixels."""
    columns = confusion.iou(), confusion.accuracy(), confusion.pixels, confusion.counts_CC.sum(0)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    keys = ("class", "IoU", "accuracy", "pixels", "predicted_pixels")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def _write_classes(path: Path, confusion: Confusion, names: Sequence[str]) -> None:
    rows = class_table(confusion, names)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
    _write_text(path, text.getvalue())


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def _write_bytes(path: Path, data: Tensor) -> None:
    with atomic_write(path) as file:
        file.write(data.numpy().tobytes())


def _draw_confusion(path: Path, confusion: Confusion, names: Sequence[str]) -> None:
    """Draws the confusion matrix as shares of each class's pixels; leaves out classes without pixels."""
    present = [label for label, pixels in enumerate(confusion.pixels.tolist()) if pixels]
    counts = confusion.counts_CC[present][:, present].double().numpy()
    shares = counts / confusion.pixels[present].double().numpy()[:, None]
    size = 3.5 + 0.22 * min(len(present), _MOST_NAMED)
    figure, axes = new_figure(1, 1, (size + 1, size))
    image = axes.imshow(np.sqrt(shares), vmin=0, vmax=1, cmap="viridis")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if len(present) <= _MOST_NAMED:
        labels = [names[label] for label in present]
        axes.set_xticks(range(len(present)), labels, rotation=90)
        axes.set_yticks(range(len(present)), labels)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, ticks=np.sqrt([0, 0.01, 0.1, 0.3, 0.6, 1]))
    bar.ax.set_yticklabels(["0", "1%", "10%", "30%", "60%", "100%"])
    bar.set_label("share of the true class's pixels")
    save_figure(figure, path)


def _shown_samples(images: Sequence[ShownImage], stream: Stream, names: Sequence[str]) -> Iterator[ShownSample]:
    for image in images:
        whole = picture(image.pixels)
        confusion = Confusion.of(image.truth, image.predicted, len(names))
        metrics = confusion.metrics()
        lines = {"pictures": "image, truth, prediction with its legend"}
        if metrics:
            lines = {"right pixels": f"{metrics['pixel_accuracy']:.0%}"} | lines
        truth = [color_labels(whole, image.truth.numpy())] if metrics else []
        yield ShownSample(
            images=[whole, *truth, draw_labels(whole, image.predicted.numpy(), names)],
            title=stream.name(image.sample_index),
            lines=lines,
        )


def _note(result: SegmentedImages) -> str:
    return f"{len(result.shown)} of {result.num_images} images. Pixels without a label are dark in the truth."


def _stem(stream: Stream, sample_index: int) -> str:
    source, index = stream.sources.locate(sample_index)
    assert isinstance(source, SegmentationSamples)
    return source.source.stem(index)
