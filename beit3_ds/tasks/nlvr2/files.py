"""Reads NLVR2's published files, or custom statements about two images from JSON lines.

| format | file | images of an entry |
|---|---|---|
| NLVR2 | `train.json`, `dev.json`, `test1.json`: one object per line, `identifier`, `sentence`, `label` | as below |
| JSON lines | `left`, `right`, `sentence`, `label`, optional `id` and `group` | paths `left` and `right` |

An identifier such as `dev-850-0-1` has the form SPLIT-SET-PAIR-SENTENCE. SET is the id of a set of sentences, PAIR is
the id of a pair of images, and SENTENCE is the id of the sentence in its set. The images of this entry are
`dev-850-0-img0.png` and `dev-850-0-img1.png`. Training images are in subfolders; the value of an entry's key
`directory` is the name of the subfolder.
"""

import json
import os
from array import array
from collections.abc import Iterator
from typing import Any

from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.annotated import describe_files
from beit3_ds.data.images.by_name import ImagesByName
from beit3_ds.data.images.captions import clean_caption
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.printing import printable

_NO_LABEL = -1


class Statements:
    """Holds statements about two images each, with labels if the split has labels."""

    def __init__(self, annotations: str, folder: str) -> None:
        """Creates an empty collection of statements.

        Args:
            annotations: path of the file of statements.
            folder: folder of the images, or a pattern of tar files (`ImagesByName`). Images outside the folder are
                rejected.

        Raises:
            ConfigError: if `folder` is neither a folder nor a pattern of tar files.
        """
        self.annotations, self.images = annotations, ImagesByName(folder)
        self.skipped: dict[str, Skipped] = {}
        self.paths = CompactStrings()  # left and right image of each sample in turn
        self._sentences, self._identifiers, self._groups = CompactStrings(), CompactStrings(), CompactStrings()
        self._labels = array("b")
        self._lines: dict[int | str, int] = {}

    def add_statement(
        self, identifier: int | str, images: tuple[str, str], sentence: str, label: bool | None, group: str, line: int
    ) -> None:
        """Adds a statement to the collection.

        Args:
            identifier: id of the sample in results.
            images: paths of the left and the right image, relative to the folder.
            sentence: the statement.
            label: whether the statement is true; None if the split has no labels.
            group: name of the statement's group. The metric "consistency" is the share of groups without a wrong
                answer.
            line: line number of the statement in the file.

        Raises:
            ConfigError: if the identifier occurs twice, or the sentence is empty or not valid text.
        """
        where = f"nlvr2: {printable(self.annotations)}:{line}"
        if identifier in self._lines:
            raise ConfigError(
                f"{where}: the id {identifier!r} occurs twice (first in line {self._lines[identifier]}). Every sample "
                "needs an id of its own, or it would count twice."
            )
        try:
            self._sentences.append(clean_caption(sentence))
        except ValueError as error:
            raise ConfigError(f"{where}: broken sentence: {error}. Remove the line or write its sentence.") from error
        self._lines[identifier] = line
        self._identifiers.append(json.dumps(identifier))
        self._groups.append(group)
        self._labels.append(_NO_LABEL if label is None else int(label))
        for path in images:
            self.paths.append(path)

    def __len__(self) -> int:
        """Returns the number of statements."""
        return len(self._sentences)

    def files(self) -> Iterator[SourceFile]:
        """Yields the name, size in bytes and number of samples of the statements file.

        Raises:
            ConfigError: if the file no longer exists.
        """
        ((num_bytes, _),) = describe_files([self.annotations])
        yield SourceFile(os.path.basename(self.annotations), num_bytes, len(self))

    def name(self, index: int) -> str:
        """Returns the file, the line and the identifier of a sample, for messages."""
        identifier = self.identifier(index)
        return printable(f"{self.annotations}:{self._lines[identifier]} ({identifier})")

    def image_files(self) -> Iterator[str]:
        """Yields the paths of the left and the right image of every statement."""
        return (os.path.join(self.images.path, self.paths[number]) for number in range(len(self.paths)))

    def identifier(self, index: int) -> int | str:
        """Returns the identifier of a sample."""
        identifier: int | str = json.loads(self._identifiers[index])
        return identifier

    def sentence(self, index: int) -> str:
        """Returns the sentence of a sample."""
        return self._sentences[index]

    def group(self, index: int) -> str:
        """Returns the name of a sample's group.

        The statements of a group have the same sentence but different images, unless a file of JSON lines sets other
        groups.
        """
        return self._groups[index]

    def label(self, index: int) -> bool | None:
        """Returns whether a statement is true; None if it has no label."""
        return None if self._labels[index] == _NO_LABEL else bool(self._labels[index])

    @property
    def has_labels(self) -> bool:
        """Returns whether all statements have labels."""
        return _NO_LABEL not in self._labels

    def check_has_labels(self) -> None:
        """Checks that every statement has a label.

        Raises:
            ConfigError: if a statement has no label; the message names the first such statement.
        """
        if not self.has_labels:
            name = self.name(self._labels.index(_NO_LABEL))
            raise ConfigError(
                f"nlvr2: {name} has no label. Such samples can be answered, but neither trained on nor scored."
            )

    def check_no_image_is_missing(self) -> None:
        """Checks that the images of all statements exist; lists each folder once and opens no image.

        Raises:
            ConfigError: if images are missing; the message contains the number of missing images and the first one.
            StorageError: if the file system fails.
        """
        paths = [self.paths[number] for number in range(len(self.paths))]
        missing = set(self.images.missing(paths))
        if missing:
            first = next(number for number, path in enumerate(paths) if path in missing)
            raise ConfigError(
                f"nlvr2: {printable(self.images.path)} lacks {len(missing):,} of {len(set(paths)):,} images. The first "
                f"is {printable(paths[first])} of {self.name(first // 2)}. Correct 'images' in the config, fetch the "
                "missing images, or remove their lines."
            )

    def image_path(self, index: int, side: int) -> str:
        """Returns the path of a sample's left or right image, relative to the folder of images.

        Args:
            index: index of the sample.
            side: 0 for the left image, 1 for the right image.
        """
        return self.paths[2 * index + side]

    def image(self, index: int, side: int, min_side: int | None = None) -> Image.Image:
        """Decodes one of the two images of a sample, with EXIF orientation applied, in RGB.

        Args:
            index: index of the sample.
            side: 0 for the left image, 1 for the right image.
            min_side: minimum shorter side of the decoded image in pixels; a larger JPEG may be decoded at reduced size.
                None decodes all pixels.

        Raises:
            BrokenRecordError: if the image cannot be read or is outside the folder.
            StorageError: if the file system fails.
        """
        path = self.image_path(index, side)
        try:
            return self.images.image(path, min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)} ({printable(path)}): broken image: {error}") from error


def read_nlvr2(path: str, folder: str) -> Statements:
    """Reads a published file of NLVR2 statements (Suhr et al., 2019, arXiv:1811.00491).

    Args:
        path: `train.json`, `dev.json` or `test1.json`, or a published balanced or unbalanced subset of one of these
            files.
        folder: folder of the split's images, or a parent folder with the subfolder `SPLIT` or `images/SPLIT`, such as
            `dev` or `images/dev`. If an entry has the key `directory`, its value names a further subfolder with the
            entry's images.

    Raises:
        ConfigError: if the file cannot be read, if a line does not have NLVR2's form, or if an identifier occurs twice;
            the message names the line.
    """
    samples = Statements(path, folder)
    prefixes: dict[str, str] = {}
    for number, line in iterate_json_lines(path, {"identifier": str, "sentence": str}):
        parts = line["identifier"].split("-")
        if len(parts) != 4:
            raise ConfigError(
                f"nlvr2: {path}:{number}: identifier {line['identifier']!r} is not of the form SPLIT-SET-PAIR-SENTENCE."
            )
        split, group, _, sentence = parts
        prefix = prefixes.setdefault(split, _prefix(folder, split))
        directory = f"{line['directory']}/" if "directory" in line else ""
        stem = f"{prefix}{directory}{line['identifier'].rpartition('-')[0]}"
        images = (f"{stem}-img0.png", f"{stem}-img1.png")
        samples.add_statement(
            line["identifier"],
            images,
            line["sentence"],
            _label(line, path, number),
            f"{split}-{group}-{sentence}",
            number,
        )
    return samples


def _prefix(folder: str, split: str) -> str:
    """Returns the subfolder of `folder` that contains a split's images, with a "/" at the end. If there is no such
    subfolder, returns "".
    """
    found = (name for name in (split, f"images/{split}") if os.path.isdir(os.path.join(folder, name)))
    name = next(found, "")
    return f"{name}/" if name else ""


def read_statement_lines(path: str, folder: str) -> Statements:
    """Reads statements about two images from JSON lines.

    Args:
        path: file with one JSON object per line. `left` and `right` are the paths of the images in the folder.
            `sentence` is the statement. `label` is true or false; a test split has no labels. `id` and `group` are
            optional. Without `group`, statements with the same sentence are one group.
        folder: folder of the images.

    Raises:
        ConfigError: if the file cannot be read, if a line lacks a key or has an invalid value, or if an id occurs
            twice; the message names the line.
    """
    samples = Statements(path, folder)
    for number, line in iterate_json_lines(path, {"left": str, "right": str, "sentence": str}):
        identifier = line.get("id", len(samples))
        if not isinstance(identifier, int | str):
            raise ConfigError(f"nlvr2: {path}:{number}: the id {identifier!r} is neither a number nor a text.")
        group = str(line.get("group", line["sentence"]))
        images = (line["left"], line["right"])
        samples.add_statement(identifier, images, line["sentence"], _label(line, path, number), group, number)
    return samples


def _label(line: dict[str, Any], path: str, number: int) -> bool | None:
    """Returns the label of a line; None if there is none. The official files write labels as strings."""
    labels = {"true": True, "false": False}
    if "label" not in line:
        return None
    label = str(line["label"]).lower()
    if label not in labels:
        raise ConfigError(f"nlvr2: {path}:{number}: label {line['label']!r} is neither true nor false.")
    return labels[label]
