"""What every source of images offers, however its files are laid out."""

from collections.abc import Iterable
from typing import Protocol

from PIL import Image

from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.records import Skipped


class ImageSource(Protocol):
    """Images, with captions if the corpus has them, by number.

    The order is part of the data order: it follows from the files alone. Broken samples keep their number. Instances
    can be pickled and read from several processes.
    """

    @property
    def skipped(self) -> dict[str, Skipped]:
        """What is left out, by reason."""

    def __len__(self) -> int:
        """Samples, broken ones included."""

    def files(self) -> Iterable[SourceFile]:
        """Returns the files that the samples come from, in order."""

    def name(self, index: int) -> str:
        """File and key of a sample, for messages."""

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """The image of a sample, upright and in RGB.

        Args:
            index: number of the sample.
            min_side: pixels on the shorter side that are enough (`images.decode_image`); None asks for all.

        Raises:
            BrokenRecordError: if it has none, or one that cannot be read.
            StorageError: if the file system fails.
        """

    def caption(self, index: int) -> str:
        """The caption of a sample: not empty, valid Unicode without NUL, no white space around it.

        Raises:
            BrokenRecordError: if it has none, or one that cannot be read.
            StorageError: if the file system fails.
        """

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample, read together where the files allow it.

        Args:
            index: number of the sample.
            min_side: as for `image`.

        Raises:
            BrokenRecordError: if either is missing or cannot be read.
        """
