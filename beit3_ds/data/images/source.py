"""Defines the interface of all sources of images."""

from collections.abc import Iterable
from typing import Protocol

from PIL import Image

from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped


class ImageSource(Protocol):
    """Declares the interface of numbered images, with captions if the corpus has them.

    Broken samples have numbers too, so the numbers, and with them the data order, depend only on the files. Instances
    can be pickled.
    """

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, tar members and rows per reason, with an example."""

    def __len__(self) -> int:
        """Returns the number of samples, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the name, size in bytes and number of samples of each source file, in the order of the samples."""

    def name(self, index: int) -> str:
        """Returns the file and the key of a sample, for messages."""

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Returns the image of a sample, upright and in RGB.

        Args:
            index: index of the sample, from 0.
            min_side: pixels on the shorter side that suffice (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the sample has no image, or the image cannot be read.
            StorageError: if the file system fails.
        """

    def caption(self, index: int) -> str:
        """Returns the caption of a sample: valid Unicode without NUL, not empty, without white space around it.

        Raises:
            BrokenRecordError: if the sample has no caption, or the caption cannot be read.
            StorageError: if the file system fails.
        """

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample; reads both at once if the file format allows this.

        Args:
            index: index of the sample, from 0.
            min_side: pixels on the shorter side that suffice (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the image or the caption is missing or cannot be read.
        """
