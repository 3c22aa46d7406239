"""Defines the interface of all image sources."""

from collections.abc import Iterable
from typing import Protocol

from PIL import Image

from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped


class ImageSource(Protocol):
    """Interface of a numbered collection of images, which may have captions.

    Broken samples have numbers too, so the data order depends only on the files. Instances can be pickled.
    """

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, tar members and rows for each reason, with an example."""

    def __len__(self) -> int:
        """Returns the number of samples, including broken samples."""

    def files(self) -> Iterable[SourceFile]:
        """Returns a description of each source file, in the order of the samples."""

    def name(self, index: int) -> str:
        """Returns the file and the key of a sample, for messages."""

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Returns the image of a sample, upright and in RGB.

        Args:
            index: index of the sample, from 0.
            min_side: minimum pixels of the shorter side (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the sample has no image, or the image cannot be read.
            StorageError: if the file system fails.
        """

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without surrounding white space; it is not empty and contains no NUL.

        Raises:
            BrokenRecordError: if the sample has no caption, or the caption cannot be read.
            StorageError: if the file system fails.
        """

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample; uses a single read if the file format allows one.

        Args:
            index: index of the sample, from 0.
            min_side: minimum pixels of the shorter side (`decoding.decode_image`); None decodes all pixels.

        Raises:
            BrokenRecordError: if the image or the caption is missing or cannot be read.
            StorageError: if the file system fails.
        """
