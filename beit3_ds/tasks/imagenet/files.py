"""Reads images with class labels from folders, tar files and JSON lines.

| format | class of an image |
|---|---|
| folder | topmost folder in the image's path: `n01440764/n01440764_10026.JPEG` |
| tars | last folder in the path; without folders, number in `KEY.cls`; without both, file name before `_` |
| JSON lines | value of `class` |

`KEY` is the path of an image in the tar file, without the extension. The number in `KEY.cls` is a class label. The
folders, the file name before `_` (`n01440764_10026.jpg`) and the value of `class` are class keys (`ImageClass.key`). In
JSON lines, `image` is the image's path in the folder of images.
"""

import os
from array import array
from collections.abc import Iterable

from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.json_lines import iterate_json_lines
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.images.annotated import CollectedAnnotations
from beit3_ds.data.images.folder import ImageFolder
from beit3_ds.data.images.shards import TarShards
from beit3_ds.data.images.source import ImageSource
from beit3_ds.data.images.tar_members import iterate_tar_members
from beit3_ds.printing import printable
from beit3_ds.tasks.imagenet.classes import ClassList

_MAX_CLS_BYTES = 20


class LabelledImages:
    """Holds the images of a source and their class labels; a label takes 4 bytes of memory."""

    def __init__(self, source: ImageSource, labels: "array[int]") -> None:
        """Stores the image source and the class label of each image."""
        assert len(source) == len(labels), f"{len(labels)} labels for {len(source)} images"
        self.source, self.labels = source, labels

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self.labels)

    @property
    def skipped(self) -> dict[str, Skipped]:
        """Returns the number of skipped files, members and rows for each reason, with an example."""
        return self.source.skipped

    def files(self) -> Iterable[SourceFile]:
        """Returns each source file's name, size in bytes and number of samples."""
        return self.source.files()

    def name(self, index: int) -> str:
        """Returns an image's name for messages, including the path of the image file, tar file or annotation file."""
        return self.source.name(index)

    def label(self, index: int) -> int:
        """Returns the class label of an image."""
        return self.labels[index]

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes an image, with EXIF orientation applied, in RGB.

        Args:
            index: index of the image.
            min_side: minimum shorter side of the decoded image in pixels; a larger JPEG may be decoded at reduced size.
                None decodes all pixels.

        Raises:
            BrokenRecordError: if the image cannot be read.
            StorageError: if the file system fails.
        """
        return self.source.image(index, min_side)


def read_class_folders(path: str, classes: ClassList) -> LabelledImages:
    """Reads a folder with one subfolder of images per class; the name of a subfolder is the class key.

    Raises:
        ConfigError: if the folder cannot be read, or an image is not in the subfolder of a class.
    """
    source = ImageFolder(path)
    labels = array("i")
    for index in range(len(source)):
        name = source.name(index)
        parts = os.path.relpath(name, printable(source.path)).split(os.sep)
        if len(parts) == 1:
            raise ConfigError(
                f"imagenet: {name} is in no folder of a class. Sort the images into folders that are named by the keys "
                f"of {classes.where}, or list them in JSON lines."
            )
        labels.append(classes.label(parts[0], name))
    return LabelledImages(source, labels)


def read_class_tars(
    pattern: str, classes: ClassList, cache_dir: str | None = None, files: OpenFiles | None = None
) -> LabelledImages:
    """Reads tar files of images with class labels.

    Args:
        pattern: path or glob pattern of the tar files.
        classes: the list of classes.
        cache_dir: folder of the indices that `beit3 prepare index` wrote; without one, the tar files are scanned.
        files: cache of open files for the tar files; None creates a new cache.

    Raises:
        ConfigError: if a tar file cannot be read, or the class of an image is missing or unknown.
        StorageError: if the file system fails.
    """
    source = TarShards([pattern], cache_dir, files)
    labels = array("i")
    for path, shard in zip(source.paths, source.files(), strict=True):
        numbers = read_with_retries(lambda path=path: _cls_members(path), path)  # type: ignore[misc]
        for index in range(len(labels), len(labels) + shard.num_samples):
            name = source.name(index)
            key = name.removeprefix(f"{printable(path)}:")
            labels.append(_tar_label(key, numbers.get(key), name, classes))
    return LabelledImages(source, labels)


def _tar_label(key: str, number: int | None, name: str, classes: ClassList) -> int:
    """Returns the label of a sample in a tar file: from the folder, else the `cls` member, else the sample's name."""
    folder, _, stem = key.rpartition("/")
    if folder or number is None:
        return classes.label(folder.rpartition("/")[2] or stem.partition("_")[0], name)
    if number >= len(classes):
        raise ConfigError(f"imagenet: {name}.cls is {number}, but {classes.where} has classes 0 to {len(classes) - 1}.")
    return number


def _cls_members(tar: str) -> dict[str, int]:
    """Returns the label in each `cls` member of a tar file, by member name without the extension."""
    found = {}
    with open(tar, "rb", buffering=0) as file:
        for member in iterate_tar_members(file.fileno()):
            key, _, extension = member.name.rpartition(".")
            if extension != "cls":
                continue
            text = os.pread(file.fileno(), min(member.size, _MAX_CLS_BYTES), member.offset).strip()
            if not (text.isascii() and text.isdigit()):
                raise ConfigError(f"imagenet: {printable(tar)}:{printable(member.name)} is {text!r} and not a number.")
            found[printable(key)] = int(text)
    return found


def read_class_lines(path: str, folder: str, classes: ClassList) -> LabelledImages:
    """Reads images with class labels from JSON lines with the keys `image` (path in the folder) and `class`.

    Args:
        path: path of the JSON lines file.
        folder: folder of the images.
        classes: the list of classes.

    Raises:
        ConfigError: if the file cannot be read, if a line lacks a key or has an invalid value, if an image occurs
            twice, or if a class is unknown; the message names the line.
    """
    samples, labels = CollectedAnnotations(path, folder), array("i")
    lines: dict[str, int] = {}
    for number, line in iterate_json_lines(path, {"image": str, "class": str}):
        image = line["image"]
        if image in lines:
            raise ConfigError(
                f"imagenet: {path}:{number}: the image {image!r} occurs twice (first in line {lines[image]}), so it "
                "would count twice."
            )
        lines[image] = number
        labels.append(classes.label(line["class"], f"{path}:{number}"))
        samples.add_sample(samples.add_image(image), "", number)
    return LabelledImages(samples, labels)
