"""Scores a folder of predicted label maps, which this or another program wrote."""

import os
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.data.files.folder import Folder
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES
from beit3_ds.data.images.folder import open_folder
from beit3_ds.printing import printable
from beit3_ds.tasks.segmentation.confusion import Confusion
from beit3_ds.tasks.segmentation.files import LabelMaps, decode_labels, describe_size_difference

_EXTENSION = ".png"


def score_folder(path: str, sources: Sequence[LabelMaps], num_classes: int) -> Confusion:
    """Compares predicted label maps with those of a split, and counts pixels by true and predicted class.

    A prediction is `NAME.png` for the image `NAME.jpg`, with one byte per pixel: class + 1, as in the folder
    `predictions` of an evaluation.

    Args:
        path: folder of the predictions.
        sources: images of the split. Images without a label map need a prediction too, but are not scored.
        num_classes: number of classes.

    Raises:
        ConfigError: if the folder cannot be read, lacks the prediction of an image, or has a PNG without an image in
            the split. Also if a prediction or a label map is broken, has another size, or holds a value that is no
            class; the message then names the file.
    """
    folder = open_folder(path)
    images = [(source, index) for source in sources for index in range(len(source))]
    _check_names(path, _list_predictions(folder.path), {source.stem(index) for source, index in images})
    confusion = Confusion.empty(num_classes)
    for source, index in images:
        if source.has_labels(index):
            confusion += _score_image(folder, source, index, num_classes)
    return confusion


def _score_image(folder: Folder, source: LabelMaps, index: int, num_classes: int) -> Confusion:
    try:
        truth = source.labels(index)
    except BrokenRecordError as error:
        raise ConfigError(f"results: {error}. Repair the label map, or remove it and its image.") from error
    name = source.stem(index) + _EXTENSION
    try:
        predicted = _classes(decode_labels(folder.read(name, MAX_IMAGE_BYTES)), num_classes)
        if predicted.shape != truth.shape:
            raise ValueError(describe_size_difference(predicted.shape[::-1], truth.shape[::-1]))
    except (OSError, ValueError) as error:
        where = printable(os.path.join(folder.path, name))
        raise ConfigError(f"results: {where}: broken prediction: {error}. Correct the file.") from error
    return Confusion.of(torch.from_numpy(truth), torch.from_numpy(predicted), num_classes)


def _classes(values: NDArray[np.uint8], num_classes: int) -> NDArray[np.uint8]:
    """Returns the class of each pixel of a prediction, which is the pixel's value - 1.

    Raises:
        ValueError: if a value is not between 1 and `num_classes`.
    """
    beyond = (values < 1) | (values > num_classes)
    if beyond.any():
        row, column = (int(place[0]) for place in np.nonzero(beyond))
        raise ValueError(
            f"value {values[row, column]} at row {row}, column {column}; predictions hold class + 1, 1 to {num_classes}"
        )
    return values - np.uint8(1)


def _check_names(path: str, found: set[str], wanted: set[str]) -> None:
    if missing := sorted(wanted - found):
        raise ConfigError(
            f"results: {printable(path)} lacks {len(missing):,} of {len(wanted):,} images of the split. The first is "
            f"{printable(missing[0] + _EXTENSION)}. Add the predictions, or choose the split that the folder is of."
        )
    if unknown := sorted(found - wanted):
        raise ConfigError(
            f"results: {printable(path)} has {len(unknown):,} PNGs of images that the split lacks. The first is "
            f"{printable(unknown[0] + _EXTENSION)}. Remove them, or choose the split that the folder is of."
        )


def _list_predictions(folder: str) -> set[str]:
    """Returns the paths of all PNGs below a folder, relative to the folder and without the extension."""
    return {
        os.path.splitext(os.path.relpath(os.path.join(parent, name), folder))[0]
        for parent, _, names in os.walk(folder)
        for name in names
        if name.endswith(_EXTENSION)
    }
