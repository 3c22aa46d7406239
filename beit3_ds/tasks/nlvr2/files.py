"""Reads NLVR2's published files, and custom statements about two images in JSON lines.

| format | file | images of an entry |
|---|---|---|
| NLVR2 | `train.json`, `dev.json`, `test1.json`: one object per line, `identifier`, `sentence`, `label` | see below |
| JSON lines | `left`, `right`, `sentence`, `label`, and if need be `id`, `group` | paths `left` and `right` |

An identifier such as `dev-850-0-1` names the split, the set of sentences, the pair of images and the sentence; its
images are `dev-850-0-img0.png` and `dev-850-0-img1.png`. Those of training are in folders by `directory`.
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
    """Holds statements about two images each, with labels if the split has them."""

    def __init__(self, annotations: str, folder: str) -> None:
        """Creates an empty collection of statements.

        Args:
            annotations: path of the file of statements, for messages.
            folder: folder of the images, or a pattern of tars (`ImagesByName`); nothing outside it is read.

        Raises:
            ConfigError: if `folder` is neither a folder nor a pattern of tars.
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
        """Adds a statement.

        Args:
            identifier: number or text that names the sample in results.
            images: paths of the left and the right image in the folder.
            sentence: the statement.
            label: whether it is true; None if the split does not say.
            group: samples of one group count together for consistency.
            line: line of the entry in the file.

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
        """Yields the file of the statements.

        Raises:
            ConfigError: if the file is gone.
        """
        ((num_bytes, _),) = describe_files([self.annotations])
        yield SourceFile(os.path.basename(self.annotations), num_bytes, len(self))

    def name(self, index: int) -> str:
        """Returns the file, the line and the identifier of a sample, for messages."""
        identifier = self.identifier(index)
        return printable(f"{self.annotations}:{self._lines[identifier]} ({identifier})")

    def image_files(self) -> Iterator[str]:
        """Yields the path of both images of every statement."""
        return (os.path.join(self.images.path, self.paths[number]) for number in range(len(self.paths)))

    def identifier(self, index: int) -> int | str:
        """Returns the identifier of a sample."""
        identifier: int | str = json.loads(self._identifiers[index])
        return identifier

    def sentence(self, index: int) -> str:
        """Returns the statement of a sample."""
        return self._sentences[index]

    def group(self, index: int) -> str:
        """Returns the group of a sample: a set of statements with equal sentences, about different images."""
        return self._groups[index]

    def label(self, index: int) -> bool | None:
        """Returns whether a statement is true; None if the split does not say."""
        return None if self._labels[index] == _NO_LABEL else bool(self._labels[index])

    @property
    def has_labels(self) -> bool:
        """Returns whether all statements have labels."""
        return _NO_LABEL not in self._labels

    def check_has_labels(self) -> None:
        """Refuses a split without labels.

        Raises:
            ConfigError: with the file and the first sample without a label.
        """
        if not self.has_labels:
            name = self.name(self._labels.index(_NO_LABEL))
            raise ConfigError(
                f"nlvr2: {name} has no label. Such samples can be answered, but neither trained on nor scored."
            )

    def check_no_image_is_missing(self) -> None:
        """Refuses a file that names an image that is not there; lists each folder once and opens no image.

        Raises:
            ConfigError: with the number of missing images, and the first of them with the sample that names it.
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
        """Returns the path of the left (0) or right (1) image of a sample in the folder."""
        return self.paths[2 * index + side]

    def image(self, index: int, side: int, min_side: int | None = None) -> Image.Image:
        """Decodes the left (0) or right (1) image of a sample, upright and in RGB.

        Raises:
            BrokenRecordError: if it cannot be read or is outside the folder.
            StorageError: if the file system fails.
        """
        path = self.image_path(index, side)
        try:
            return self.images.image(path, min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)} ({printable(path)}): broken image: {error}") from error


def read_nlvr2(path: str, folder: str) -> Statements:
    """Reads NLVR2 (Suhr et al., 2019, arXiv:1811.00491).

    Args:
        path: `train.json`, `dev.json`, `test1.json` or one of the balanced and unbalanced parts of these.
        folder: folder of the split's images, or the folder above it. Either may hold the images of a split directly or
            in folders by `directory`.

    Raises:
        ConfigError: if the file cannot be read, a line does not have this form or an identifier occurs twice; the
            message names the line.
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
    """Returns the folder of a split's images below the folder that the configuration names."""
    found = (name for name in (split, f"images/{split}") if os.path.isdir(os.path.join(folder, name)))
    name = next(found, "")
    return f"{name}/" if name else ""


def read_statement_lines(path: str, folder: str) -> Statements:
    """Reads statements from JSON lines.

    Args:
        path: file with one object per line: `left` and `right` (paths in the folder), `sentence`, `label` (true or
            false) unless it is a test split, and where wanted `id` and `group`; equal sentences are one group.
        folder: folder of the images.

    Raises:
        ConfigError: if the file cannot be read, a line does not have this form or an id occurs twice; the message names
            the line.
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
    """Returns the label of a line: true or false, also in quotes as the official files have it."""
    labels = {"true": True, "false": False}
    if "label" not in line:
        return None
    label = str(line["label"]).lower()
    if label not in labels:
        raise ConfigError(f"nlvr2: {path}:{number}: label {line['label']!r} is neither true nor false.")
    return labels[label]
