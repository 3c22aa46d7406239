"""Stores images with an identifier and several captions each, for captioning and retrieval."""

import json
from array import array
from collections.abc import Sequence

from beit3_ds.config import ConfigError
from beit3_ds.data.images.annotated import AnnotatedImages, CollectedAnnotations
from beit3_ds.data.images.captions import clean_caption
from beit3_ds.data.images.compact_strings import CompactStrings


class CaptionedImages(CollectedAnnotations):
    """Stores images with their captions: one sample per caption, and the samples of an image are consecutive.

    An image without captions has no sample. `each_image` returns a collection with one sample per image, also for
    images without captions.
    """

    def __init__(self, annotations: str, folder: str) -> None:
        """Creates an empty collection.

        Args:
            annotations: path of the caption file, for messages.
            folder: folder of the images, or a pattern of tars.
        """
        super().__init__(annotations, folder)
        self._identifiers, self._ends = CompactStrings(), array("q")
        self._image_lines = array("q")
        self._places: dict[int | str, str] = {}

    def add_captioned_image(
        self, identifier: object, path: str, captions: Sequence[object], where: str, line: int | None = None
    ) -> None:
        """Adds an image with all its captions.

        Args:
            identifier: number or text that identifies the image in result files.
            path: path of the image in the folder.
            captions: captions of the image; may be empty in a test split.
            where: location of the entry for messages, such as `captions.jsonl:3`.
            line: line number of the entry, counted from 1; None if the file is not read line by line.

        Raises:
            ConfigError: if the identifier occurs twice, or a caption is empty or not valid text.
        """
        if not isinstance(identifier, int | str):
            raise ConfigError(f"data: {where}: the id {identifier!r} is neither a number nor a text.")
        if identifier in self._places:
            raise ConfigError(
                f"data: {where}: the image id {identifier!r} occurs twice (first in {self._places[identifier]}). Every "
                "image needs an id of its own, or it would count twice."
            )
        self._places[identifier] = where.rpartition(":")[2].strip()
        number = self.add_image(path)
        self._identifiers.append(json.dumps(identifier))
        for place, caption in enumerate(captions):
            try:
                self.add_sample(number, clean_caption(caption if isinstance(caption, str) else ""), line)
            except ValueError as error:
                raise ConfigError(
                    f"data: {where}: caption {place} of image {identifier!r} is broken: {error}. Remove it or write it."
                ) from error
        self._ends.append(len(self))
        if line is not None:
            self._image_lines.append(line)

    @property
    def num_images(self) -> int:
        """Returns the number of images."""
        return len(self._ends)

    @property
    def image_lines(self) -> "array[int]":
        """Returns the line number of each image in the caption file, counted from 1; empty if the caption file is not
        read line by line.
        """
        return self._image_lines

    def identifier(self, image: int) -> int | str:
        """Returns the identifier of the image with index `image`."""
        identifier: int | str = json.loads(self._identifiers[image])
        return identifier

    def samples_of(self, image: int) -> range:
        """Returns the sample indices of the captions of the image with index `image`."""
        return range(self._ends[image - 1] if image else 0, self._ends[image])

    def references(self, image: int) -> list[str]:
        """Returns all captions of the image with index `image`; empty for an image of a test split."""
        return [self.captions[sample] for sample in self.samples_of(image)]

    def each_image(self) -> "EachImage":
        """Returns a collection of the same images with one sample per image instead of one sample per caption."""
        return EachImage(self)


class EachImage(AnnotatedImages):
    """Stores one sample per image, with the first caption of the image, or an empty caption if there is none.

    `references` returns all captions of the image.
    """

    def __init__(self, captioned: CaptionedImages) -> None:
        """Builds one sample per image of `captioned`; an image without captions gets an empty caption."""
        count = captioned.num_images
        firsts = CompactStrings((captioned.references(image) or [""])[0] for image in range(count))
        super().__init__(
            captioned.annotations,
            captioned.images.path,
            captioned.paths,
            firsts,
            array("q", range(count)),
            captioned.skipped,
            captioned.image_lines,
        )
        self._captioned = captioned

    def identifier(self, index: int) -> int | str:
        """Returns the identifier of the image of sample `index`."""
        return self._captioned.identifier(index)

    def references(self, index: int) -> list[str]:
        """Returns all captions of the image of sample `index`; empty for an image of a test split."""
        return self._captioned.references(index)

    def check_has_references(self) -> None:
        """Checks that every image has at least one caption.

        Raises:
            ConfigError: if an image has no caption; the message names the file and the image.
        """
        for index in range(len(self)):
            if not self.references(index):
                raise ConfigError(
                    f"data: {self.annotations}: image {self.identifier(index)!r} has no captions, as those of a test "
                    "split. Such a split can be captioned and submitted, but neither trained on nor scored."
                )
