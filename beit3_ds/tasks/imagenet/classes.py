"""Reads the names of image classes; the task compares images with these names."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

from beit3_ds.config import ConfigError
from beit3_ds.config.strict import nearest
from beit3_ds.data.files.names import iterate_names


class ImageClass(NamedTuple):
    """Holds the key and the name of an image class."""

    key: str
    """Short name of the class in data files, such as the WordNet id `n01440764`."""
    name: str
    """Name of the class in words, such as `tench, Tinca tinca`."""


class ClassList:
    """Holds the image classes; the label of a class is its index in the list."""

    def __init__(self, classes: Iterable[ImageClass], where: str = "classes") -> None:
        """Stores and checks the classes.

        Args:
            classes: the classes, in the order of their labels. Two classes may have the same name, such as ImageNet's
                two classes `crane`; no model can tell such classes apart.
            where: file with the classes, for messages.

        Raises:
            ConfigError: if there are no classes, if a key occurs twice, or if a class has no name.
        """
        self.classes, self.where = tuple(classes), where
        if not self.classes:
            raise ConfigError(f"imagenet: {where} has no classes. Write one per line: its key, a space, its name.")
        for label, (key, name) in enumerate(self.classes):
            if not key or not name:
                raise ConfigError(f"imagenet: {where}: class {label} ({key!r}) has no name.")
            if self.labels[key] != label:
                raise ConfigError(
                    f"imagenet: {where}: the class {key!r} occurs twice, as {label} and {self.labels[key]}."
                )

    def __len__(self) -> int:
        """Returns the number of classes."""
        return len(self.classes)

    def __iter__(self) -> Iterator[ImageClass]:
        """Yields the classes in the order of their labels."""
        return iter(self.classes)

    @cached_property
    def labels(self) -> Mapping[str, int]:
        """Maps class keys to labels."""
        return {found.key: label for label, found in enumerate(self.classes)}

    @property
    def names(self) -> tuple[str, ...]:
        """Returns the class names in the order of the labels."""
        return tuple(found.name for found in self.classes)

    def digest(self) -> str:
        """Returns 16 hexadecimal digits of a hash of the class keys and names, in the order of the labels."""
        return hashlib.sha256(json.dumps(self.classes).encode()).hexdigest()[:16]

    def label(self, key: str, where: str) -> int:
        """Returns the label of the class that has the given key.

        Args:
            key: key of the class.
            where: image or line with this key, for messages.

        Raises:
            ConfigError: if the list has no class with this key.
        """
        if key not in self.labels:
            near = nearest(key, self.labels)
            raise ConfigError(
                f"imagenet: {where} is of the class {key[:80]!r}, which is not among the {len(self)} classes of "
                f"{self.where}.{f' Did you mean {near!r}?' if near else ''} Add it there, or leave the images out."
            )
        return self.labels[key]

    @classmethod
    def load(cls, path: str) -> "ClassList":
        """Reads a file of classes with one `KEY NAME` per line, such as ImageNet's `LOC_synset_mapping.txt`.

        Raises:
            ConfigError: if the file cannot be read, or a line is not of this form.
        """
        classes = []
        try:
            for number, line in enumerate(iterate_names(path), start=1):
                key, _, name = line.strip().partition(" ")
                if key and not name.strip():
                    raise ConfigError(
                        f"imagenet: {path}:{number} is {line.strip()[:80]!r}: write the key of a class, a space and "
                        "its name."
                    )
                if key:
                    classes.append(ImageClass(key, name.strip()))
        except ConfigError:
            raise
        except (OSError, ValueError) as error:
            raise ConfigError(f"imagenet: {path} cannot be read as a list of classes: {error}.") from error
        return cls(classes, path)
