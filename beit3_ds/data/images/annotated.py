"""Reads images with captions from an annotation file: one sample per caption."""

import os
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.by_name import ImagesByName
from beit3_ds.data.images.captions import clean_caption
from beit3_ds.data.images.compact_strings import CompactStrings, StoredStrings
from beit3_ds.printing import printable

NO_IMAGE = -1
"""Image number of a sample whose image the annotation file does not list."""


class AnnotatedImages:
    """Reads the samples of an annotation file, one sample per caption: an image with five captions is five samples.

    Memory use: 16 bytes plus the caption per sample, and 8 bytes plus the path per image. If the file is read line by
    line, line numbers take 8 more bytes per sample.
    """

    def __init__(
        self,
        annotations: str,
        folder: str,
        paths: StoredStrings,
        captions: StoredStrings,
        image_numbers: "array[int] | NDArray[np.int64]",
        skipped: dict[str, Skipped],
        lines: "array[int] | None" = None,
    ) -> None:
        """Stores the samples and opens the folder of images.

        Args:
            annotations: path of the annotation file, for messages.
            folder: folder of the images, or a pattern of tars (`ImagesByName`). Images outside the folder are never
                read, even if annotations name them.
            paths: path of each image in the folder or in the tars.
            captions: caption of each sample.
            image_numbers: index into `paths` for each sample, or `NO_IMAGE`.
            skipped: number of skipped rows and files for each reason, with an example.
            lines: line number of each sample in the annotation file, counted from 1. None or empty if the format is not
                read line by line.

        Raises:
            ConfigError: if `folder` is neither a folder nor a pattern of tars.
        """
        self.annotations, self.images, self.skipped = annotations, ImagesByName(folder), skipped
        self.paths, self.captions, self.image_numbers = paths, captions, image_numbers
        self.lines = lines

    def __len__(self) -> int:
        """Returns the number of samples, including broken samples."""
        return len(self.captions)

    def files(self) -> Iterator[SourceFile]:
        """Yields one description of the annotation file: name, size in bytes and number of samples.

        Raises:
            ConfigError: if the file no longer exists.
        """
        ((num_bytes, _),) = describe_files([self.annotations])
        yield SourceFile(os.path.basename(self.annotations), num_bytes, len(self))

    def name(self, index: int) -> str:
        """Returns a sample's name for messages: annotation file, line or sample number, and image path."""
        image = self._image_path(index) or "no image"
        place = self.lines[index] if self.lines else index
        return printable(f"{self.annotations}:{place} ({image})")

    def image_files(self) -> Iterator[str]:
        """Yields the path of every image that the annotations name."""
        return (os.path.join(self.images.path, self.paths[number]) for number in range(len(self.paths)))

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB; `min_side` is explained in `decoding.decode_image`.

        Raises:
            BrokenRecordError: if the annotation file does not list the sample's image, or the image is outside the
                folder or cannot be read.
        """
        path = self._image_path(index)
        if path is None:
            raise BrokenRecordError(f"{self.name(index)}: the annotation names an image that the file does not list")
        try:
            return self.images.image(path, min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken image: {error}") from error

    def _image_path(self, index: int) -> str | None:
        """Returns the path of a sample's image; None if the annotation file does not list the image."""
        number = int(self.image_numbers[index])
        return self.paths[number] if 0 <= number < len(self.paths) else None

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without surrounding white space.

        Raises:
            BrokenRecordError: if the caption is missing, empty, too long or not valid text.
        """
        try:
            return clean_caption(self.captions[index])
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken caption: {error}") from error

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample.

        Args:
            index: index of the sample.
            min_side: minimum pixels of the shorter side (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the image or the caption is missing or cannot be read.
        """
        caption = self.caption(index)  # first, because it is cheaper to read than the image
        return self.image(index, min_side), caption


class CollectedAnnotations(AnnotatedImages):
    """Collects the samples of an annotation file while the file is parsed."""

    def __init__(self, annotations: str, folder: str) -> None:
        """Creates an empty collection.

        Args:
            annotations: path of the annotation file, for messages.
            folder: folder of the images, or a pattern of tars.
        """
        self._paths, self._captions, self._image_numbers = CompactStrings(), CompactStrings(), array("q")
        super().__init__(annotations, folder, self._paths, self._captions, self._image_numbers, {}, array("q"))

    def add_image(self, path: str) -> int:
        """Adds the path of an image in the folder; returns the image's number."""
        self._paths.append(path)
        return len(self._paths) - 1

    def add_sample(self, image_number: int, caption: object, line: int | None = None) -> None:
        """Adds one sample: an image with one caption.

        Args:
            image_number: result of `add_image`; `NO_IMAGE` if the annotation file does not list the sample's image.
            caption: the caption. If it is not a string, reading the sample's caption raises `BrokenRecordError`.
            line: line number of the sample, counted from 1; None if the file is not read line by line.
        """
        if line is not None and self.lines is not None:
            self.lines.append(line)
        self._image_numbers.append(image_number)
        self._captions.append(caption if isinstance(caption, str) else "")

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Counts `count` more rows or files as skipped for `reason`; stores the first example of each reason."""
        before, first = self.skipped.get(reason, (0, printable(example)))
        self.skipped[reason] = Skipped(before + count, first)


def describe_files(files: Sequence[str]) -> list[list[int]]:
    """Returns each file's size in bytes, and its modification time in nanoseconds since 1970.

    Raises:
        ConfigError: if a file is missing or inaccessible; the message names the file.
    """
    try:
        return [[status.st_size, status.st_mtime_ns] for status in map(os.stat, files)]
    except OSError as error:
        raise ConfigError(f"data: {error.filename} cannot be read: {error}. Correct the path in the config.") from error
