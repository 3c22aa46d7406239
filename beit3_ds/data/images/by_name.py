"""Reads images from a folder or from tars, by the names that annotation files give."""

import os
from collections.abc import Iterable

from PIL import Image

from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.folder import Folder
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.folder import open_folder, read_image
from beit3_ds.data.images.shards import TarShards


class ImagesByName:
    """Reads images by name from a folder or from tars; never reads a file outside the folder.

    In a folder, a name is a relative path such as `val2014/COCO_val2014_000000000042.jpg`. In tars, a name is a tar
    member's path or file name, either of which works. Extensions are ignored.
    """

    def __init__(self, path: str, cache_dir: str | None = None, files: OpenFiles | None = None) -> None:
        """Opens the folder, or the tars with their index files.

        Args:
            path: a folder, or a glob pattern of tars that ends in `.tar`.
            cache_dir: folder of the index files from `beit3 prepare index`; without one, the tars are scanned.
            files: cache of open files; None creates a new cache.

        Raises:
            ConfigError: if the path is neither a folder nor a pattern of tars, or a tar cannot be read.
            StorageError: if the file system fails.
        """
        self._folder: Folder | None = None
        self._numbers: dict[str, int] = {}
        if path.endswith(".tar"):
            self.path, self._shards = path, TarShards([path], cache_dir, files)
            self._numbers = _number_keys(self._shards)
        else:
            self._folder = open_folder(path)
            self.path = self._folder.path

    def holds(self, name: str) -> bool:
        """Returns whether an image with this name exists inside the folder or the tars; does not open the image.

        Raises:
            StorageError: if the file system fails.
        """
        return self._number(name) is not None if self._folder is None else self._folder.holds(name)

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns the names that have no image, in the given order; lists each folder once and opens no image.

        Raises:
            StorageError: if the file system fails.
        """
        folder = self._folder
        if folder is None:
            return [name for name in names if self._number(name) is None]
        listed: dict[str, set[str]] = {}
        lacking = []
        for name in names:
            inside, _, file = name.rpartition("/")
            if inside not in listed:
                listed[inside] = _files_in(folder, inside)
            if file not in listed[inside]:
                lacking.append(name)
        return lacking

    def image(self, name: str, min_side: int | None = None) -> Image.Image:
        """Decodes an image, upright and in RGB; `min_side` is explained in `decoding.decode_image`.

        Raises:
            ValueError: if the image is missing, outside the folder, or cannot be read.
            StorageError: if the file system fails.
        """
        if self._folder is not None:
            return read_image(self._folder, name, min_side)
        number = self._number(name)
        if number is None:
            raise ValueError("no tar has an image of this name")
        try:
            return self._shards.image(number, min_side)
        except BrokenRecordError as error:
            raise ValueError(str(error)) from error

    def _number(self, name: str) -> int | None:
        return self._numbers.get(os.path.splitext(name)[0])


def _files_in(folder: Folder, inside: str) -> set[str]:
    path = os.path.join(folder.path, inside)
    try:
        if inside and not folder.contains(os.path.join(inside, "image")):
            return set()
        return set(read_with_retries(lambda: os.listdir(path), path))
    except (OSError, ValueError):  # no such folder, or a name with NUL
        return set()


def _number_keys(shards: TarShards) -> dict[str, int]:
    """Maps the names of images in tars to sample numbers.

    An image's name is its path in the tar, without extension. If no other image has the same last component of the
    path, this component is a second name of the image.
    """
    keys = [shards.key(number) for number in range(len(shards))]
    numbers: dict[str, int] = {}
    repeated: set[str] = set()
    for number, key in enumerate(keys):
        short = key.rpartition("/")[2]
        if short in numbers:
            repeated.add(short)
        numbers[short] = number
    for short in repeated:
        del numbers[short]
    return numbers | {key: number for number, key in reversed(list(enumerate(keys)))}
