"""Reads images and their label maps, which store the class of each pixel.

| format | images | label maps | values in label maps |
|---|---|---|---|
| `ade20k` | `PATH/images/SPLIT/*.jpg` | `PATH/annotations/SPLIT/*.png` | 0: no class; 1 to C: classes 0 to C - 1 |
| `label_maps` | `PATH` | folder in the key `annotations`, with equal file names | 0 to C - 1: class; 255: no class |

`ade20k` is the distributed form of ADEChallengeData2016; SPLIT is "training" or "validation". C is the number of
classes.
"""

import io
import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3_ds.config import ConfigError, SourceConfig
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES, MAX_PIXELS
from beit3_ds.data.images.folder import ImageFolder, header_size, open_folder
from beit3_ds.data.sources import spread
from beit3_ds.printing import printable
from beit3_ds.tasks.segmentation.config import IGNORED

FORMATS = ("ade20k", "label_maps")
"""Names of the source formats of images with label maps."""
NAMES_FILE = "objectInfo150.txt"
"""Name of the file with ADE20K's class names, in the folder of an `ade20k` source."""
MIN_SIDE, MAX_SIDE = 8, 16384
"""Minimum and maximum side of an image, in pixels."""

_EXAMINED = 1000  # headers that are checked at the start; other files are checked when they are read
_MODES = ("L", "P")  # one byte per pixel: a value, or an index into a palette


class LabelMaps:
    """Reads the images of a source and their label maps, one sample at a time.

    Needs 9 bytes of memory per sample besides the text of the image's path.
    """

    def __init__(
        self, images: ImageFolder, folder: str, num_classes: int, *, zero_is_ignored: bool, is_complete: bool = True
    ) -> None:
        """Finds the label map of each image: a file with the image's name and the extension .png.

        Args:
            images: the images.
            folder: folder of the label maps.
            num_classes: number of classes.
            zero_is_ignored: whether 0 means "no class" and classes start at 1, as in ADE20K.
            is_complete: whether each image must have a label map. If False, all pixels of an image without a label map
                have an unknown class.

        Raises:
            ConfigError: if a required label map is missing, if an image is too small or too large, or if a label map
                and its image differ in size. Looks for the label maps of all images, but checks the sizes of at most
                1000 images.
        """
        self.images, self._num_classes, self._zero_is_ignored = images, num_classes, zero_is_ignored
        self._labels = open_folder(folder)
        self._has_labels = self._find_labels()
        if is_complete and not all(self._has_labels):
            raise ConfigError(
                f"segmentation: {self._has_labels.count(0):,} of {len(images):,} images have no label map in "
                f"{printable(folder)}, the first {self.name(self._has_labels.index(0))}. Add "
                f"{printable(self._label_name(self._has_labels.index(0)))}, or remove the image."
            )
        for index in spread(len(images), _EXAMINED):
            self._check_header(index)

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.images)

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files for each reason, with an example."""
        return self.images.skipped

    def files(self) -> Iterator[SourceFile]:
        """Yields the name, the size in bytes (if known) and the number of samples of each image file."""
        return self.images.files()

    def name(self, index: int) -> str:
        """Returns the path of an image, for messages."""
        return self.images.name(index)

    def stem(self, index: int) -> str:
        """Returns an image's path relative to the source's image folder, without extension; result files have this
        name.
        """
        return os.path.splitext(self.images.relative_path(index))[0]

    def image_files(self) -> Iterable[str]:
        """Returns the paths of all images, for finding images that two splits share."""
        return (self.images.name(index) for index in range(len(self)))

    @property
    def num_labelled(self) -> int:
        """Returns the number of images with a label map."""
        return sum(self._has_labels)

    def has_labels(self, index: int) -> bool:
        """Returns whether an image has a label map."""
        return bool(self._has_labels[index])

    def read(self, index: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Decodes an image and its label map.

        Returns:
            The image in RGB, and the class of each pixel, (height, width) uint8, `IGNORED` where unknown.

        Raises:
            BrokenRecordError: if the image or the label map cannot be read, if their sizes differ, if a value is not a
                class, or if the image is too small or too large.
            StorageError: if the file system fails.
        """
        image = self.images.image(index)
        try:
            check_sides(image.size)
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: {error}") from error
        if not self.has_labels(index):
            return image, np.full(image.size[::-1], IGNORED, dtype=np.uint8)
        labels = self.labels(index)
        if labels.shape != image.size[::-1]:
            difference = describe_size_difference(labels.shape[::-1], image.size)
            raise BrokenRecordError(f"{self._label_path(index)}: broken label map: {difference}")
        return image, labels

    def labels(self, index: int) -> NDArray[np.uint8]:
        """Decodes the label map of an image. The image must have a label map (`has_labels`).

        Returns:
            The class of each pixel, (height, width) uint8; `IGNORED` for pixels without a class.

        Raises:
            BrokenRecordError: if the file of the label map is missing or cannot be read, or if it has an invalid value.
            StorageError: if the file system fails.
        """
        try:
            return self._classes(decode_labels(self._labels.read(self._label_name(index), MAX_IMAGE_BYTES)))
        except ValueError as error:
            raise BrokenRecordError(f"{self._label_path(index)}: broken label map: {error}") from error

    def _classes(self, values: NDArray[np.uint8]) -> NDArray[np.uint8]:
        first = int(self._zero_is_ignored)
        # In ADE20K's files 0 means no class; minus 1 makes it 255 (uint8), which is `IGNORED`.
        classes = values - np.uint8(first) if first else values
        beyond = (classes >= self._num_classes) & (classes != IGNORED)
        if first:
            beyond |= values == IGNORED
        if beyond.any():
            row, column = (int(place[0]) for place in np.nonzero(beyond))
            allowed = "0 and 1" if first else "255 and 0"
            raise ValueError(
                f"value {values[row, column]} at row {row}, column {column} is beyond the {self._num_classes} classes "
                f"of the task, whose label maps hold {allowed} to {self._num_classes - 1 + first}"
            )
        return classes

    def _check_header(self, index: int) -> None:
        """Checks the sizes of an image and its label map from the file headers, without decoding; ignores unreadable
        files.

        Raises:
            ConfigError: if the image is too small or too large, or the sizes differ.
        """
        image_size = self.images.header_size(index)
        label_size = header_size(self._labels, self._label_name(index)) if self.has_labels(index) else None
        if image_size is None:
            return
        try:
            check_sides(image_size)
            if label_size is not None and label_size not in (image_size, image_size[::-1]):
                raise ValueError(
                    f"{printable(self._label_path(index))}: {describe_size_difference(label_size, image_size)}"
                )
        except ValueError as error:
            raise ConfigError(
                f"segmentation: {self.name(index)}: {error}. Repair the file, or remove the image and its label map."
            ) from error

    def _find_labels(self) -> "array[int]":
        """Returns one entry per image: 1 if the image has a label map, and 0 otherwise. Reads the file names of each
        folder only once.
        """
        listed: dict[str, set[str]] = {}
        found = array("b")
        for index in range(len(self)):
            folder, name = os.path.split(self._label_name(index))
            if folder not in listed:
                listed[folder] = _list_names(os.path.join(self._labels.path, folder))
            found.append(name in listed[folder])
        return found

    def _label_name(self, index: int) -> str:
        return f"{self.stem(index)}.png"

    def _label_path(self, index: int) -> str:
        return os.path.join(self._labels.path, self._label_name(index))


def check_sides(size: tuple[int, int]) -> None:
    """Checks that an image is neither too small nor too large.

    Args:
        size: width and height in pixels.

    Raises:
        ValueError: if a side is below `MIN_SIDE` or above `MAX_SIDE`, or the image has more than `MAX_PIXELS` pixels.
    """
    width, height = size
    if min(size) < MIN_SIDE or max(size) > MAX_SIDE or width * height > MAX_PIXELS:
        raise ValueError(
            f"{width} x {height} pixels; images must have {MIN_SIDE} to {MAX_SIDE} pixels on a side, and at most "
            f"{MAX_PIXELS} in all"
        )


def decode_labels(data: bytes) -> NDArray[np.uint8]:
    """Decodes a label map from PNG bytes, (height, width) uint8.

    Raises:
        ValueError: if the bytes are not a PNG with one byte per pixel, or the image has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in _MODES:
                raise ValueError(
                    f"mode {image.mode}, but a label map has one byte per pixel (modes {', '.join(_MODES)})"
                )
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels exceed the limit of {MAX_PIXELS}")
            return np.array(image, dtype=np.uint8)
    except ValueError:
        raise
    except Exception as error:  # decoders raise nearly anything on corrupt bytes
        raise ValueError(f"{type(error).__name__}: {error}") from error


def open_label_maps(source: SourceConfig, num_classes: int, *, is_complete: bool) -> LabelMaps:
    """Opens a source of images with label maps.

    Args:
        source: configuration of the source.
        num_classes: number of classes.
        is_complete: whether each image must have a label map.

    Raises:
        ConfigError: if the source has the wrong keys for its format, if a folder cannot be read, if label maps are
            missing, or if an image or label map has a wrong size.
    """
    if source.format == "ade20k":
        if not source.split or source.annotations or source.images:
            raise ConfigError(
                f"data.images: source '{source.path}' of format ade20k needs 'split', the name of a folder in "
                'PATH/images and PATH/annotations ("training" or "validation"), and neither \'annotations\' nor '
                "'images'."
            )
        images, labels = (os.path.join(source.path, kind, source.split) for kind in ("images", "annotations"))
        return LabelMaps(ImageFolder(images), labels, num_classes, zero_is_ignored=True, is_complete=is_complete)
    if not source.annotations or source.split or source.images:
        raise ConfigError(
            f"data.images: source '{source.path}' of format label_maps needs 'annotations', the folder of its label "
            "maps, and neither 'split' nor 'images'."
        )
    return LabelMaps(
        ImageFolder(source.path), source.annotations, num_classes, zero_is_ignored=False, is_complete=is_complete
    )


def describe_size_difference(labels: tuple[int, ...], image: tuple[int, ...]) -> str:
    """Returns the message that a label map and its image have different sizes.

    Args:
        labels: width and height of the label map in pixels.
        image: width and height of the image in pixels.
    """
    return f"the label map has {labels[0]} x {labels[1]} pixels, but its image {image[0]} x {image[1]}"


def _list_names(folder: str) -> set[str]:
    try:
        return set(read_with_retries(lambda: os.listdir(folder), folder))
    except OSError:  # the folder is missing, and so are its label maps
        return set()
