"""Images of a folder with captions from an annotation file: one sample a caption."""

import os
from array import array

from PIL import Image

from beit3_ds.data.captions import clean_caption
from beit3_ds.data.compact_strings import CompactStrings
from beit3_ds.data.image_folder import printable, read_image
from beit3_ds.data.image_source import BrokenRecord, Skipped

NO_IMAGE = -1
"""Number of the image of a caption whose annotation names none."""


class AnnotatedImages:
    """Samples that an annotation file lists; an image with five captions is five samples.

    Takes 16 bytes a sample beside its caption, and 8 an image beside its path. The readers in `annotations` fill it.
    """

    def __init__(self, annotations: str, folder: str) -> None:
        """Starts without samples.

        Args:
            annotations: path of the annotation file, for messages.
            folder: where the images lie. Nothing outside it is read, whatever paths the annotations name.
        """
        self.annotations, self.folder = annotations, os.path.realpath(folder)
        self._paths, self._captions, self._image_numbers = CompactStrings(), CompactStrings(), array("q")
        self._skipped: dict[str, Skipped] = {}

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Rows and files left out, by reason."""
        return dict(self._skipped)

    def __len__(self) -> int:
        """Samples, broken ones included."""
        return len(self._captions)

    def name(self, index: int) -> str:
        """Annotation file, number of the sample in it, and path of its image."""
        number = self._image_numbers[index]
        image = "no image" if number == NO_IMAGE else self._paths[number]
        return printable(f"{self.annotations}:{index} ({image})")

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB.

        Raises:
            BrokenRecord: if its annotation names none, or one that cannot be read or lies outside the folder.
        """
        number = self._image_numbers[index]
        if number == NO_IMAGE:
            raise BrokenRecord(f"{self.name(index)}: the annotation names an image that the file does not list")
        try:
            return read_image(self.folder, self._paths[number], min_side)
        except ValueError as error:
            raise BrokenRecord(f"{self.name(index)}: broken image: {error}") from error

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without white space around it.

        Raises:
            BrokenRecord: if it is missing, empty, overlong or no valid text.
        """
        try:
            return clean_caption(self._captions[index])
        except ValueError as error:
            raise BrokenRecord(f"{self.name(index)}: broken caption: {error}") from error

    def add_image(self, path: str) -> int:
        """Adds an image by its path in the folder and returns its number."""
        self._paths.append(path)
        return len(self._paths) - 1

    def add_sample(self, image_number: int, caption: object) -> None:
        """Adds a caption of an image; one that is no text is kept as a broken sample."""
        self._image_numbers.append(image_number)
        self._captions.append(caption if isinstance(caption, str) else "")

    def skip(self, reason: str, example: str, count: int = 1) -> None:
        """Counts what is no sample."""
        before, first = self._skipped.get(reason, (0, printable(example)))
        self._skipped[reason] = Skipped(before + count, first)
