"""Images that annotations name, in a folder of image files or in a folder of tars."""

import os
from collections.abc import Iterable

from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.printing import printable
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import BrokenRecordError
from beit3_ds.data.images.folder import open_folder, read_image
from beit3_ds.data.images.shards import TarShards


class ImagesByName:
    """Reads images by their names in a folder; nothing outside the folder is read.

    A name is a path in the folder, such as `val2014/COCO_val2014_000000000042.jpg`. If the folder has tars, the images
    are their members, and a name is a member's path with or without its folders; the extension does not matter.
    Instances can be pickled.
    """

    def __init__(self, path: str, cache_dir: str | None = None, files: OpenFiles | None = None) -> None:
        """Opens the folder, and the indices of its tars.

        Args:
            path: the folder.
            cache_dir: folder of the indices that `beit3 prepare index` wrote; None scans the tars.
            files: keeps tars open; None uses a new `OpenFiles`.

        Raises:
            ConfigError: if the path is not a folder, or a tar cannot be read.
            StorageError: if the file system fails.
        """
        self._folder = open_folder(path)
        tars = sorted(name for name in _list(self._folder.path) if name.endswith(".tar"))
        self._shards: TarShards | None = None
        self._numbers: dict[str, int] = {}
        if tars:
            self._shards = TarShards([os.path.join(self._folder.path, name) for name in tars], cache_dir, files)
            self._numbers = _number_keys(self._shards)

    @property
    def path(self) -> str:
        """Returns the path of the folder, without links."""
        return self._folder.path

    def missing(self, names: Iterable[str]) -> list[str]:
        """Returns the names that the folder lacks, in their order; lists each folder once and opens no image.

        Raises:
            StorageError: if the file system fails.
        """
        if self._shards is not None:
            return [name for name in names if self._number(name) is None]
        listed: dict[str, set[str]] = {}
        lacking = []
        for name in names:
            inside, _, file = name.rpartition("/")
            if inside not in listed:
                listed[inside] = self._files_in(inside)
            if file not in listed[inside]:
                lacking.append(name)
        return lacking

    def image(self, name: str, min_side: int | None = None) -> Image.Image:
        """Decodes an image, upright and in RGB (`decoding.decode_image`).

        Raises:
            BrokenRecordError: if it is missing, outside the folder, or cannot be read.
            StorageError: if the file system fails.
        """
        if self._shards is not None:
            number = self._number(name)
            if number is None:
                raise BrokenRecordError(f"{printable(self.path)}: no tar has an image {printable(name)}")
            return self._shards.image(number, min_side)
        try:
            return read_image(self._folder, name, min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{printable(os.path.join(self.path, name))}: broken image: {error}") from error

    def _number(self, name: str) -> int | None:
        return self._numbers.get(os.path.splitext(name)[0])

    def _files_in(self, inside: str) -> set[str]:
        try:
            if inside and not self._folder.contains(os.path.join(inside, "image")):
                return set()
            return set(_list(os.path.join(self._folder.path, inside)))
        except (ConfigError, ValueError):  # no such folder, or a name with NUL
            return set()


def open_images_by_name(
    path: str, names: Iterable[tuple[str, str]], cache_dir: str | None = None, files: OpenFiles | None = None
) -> ImagesByName:
    """Opens a folder and checks that it has all images that annotations name.

    Args:
        path: folder of image files or of tars.
        names: name of each image, and the file and line or record that names it.
        cache_dir: as for `ImagesByName`.
        files: as for `ImagesByName`.

    Raises:
        ConfigError: with the number of missing images, the first of them, and where it is named.
        StorageError: if the file system fails.
    """
    images = ImagesByName(path, cache_dir, files)
    places = dict(reversed(list(names)))  # the first place of each name
    lacking = images.missing(sorted(places))
    if lacking:
        raise ConfigError(
            f"data: {printable(images.path)} lacks {len(lacking):,} of {len(places):,} images, such as "
            f"{printable(lacking[0])}, which {printable(places[lacking[0]])} names. Correct 'images' in the config, "
            "fetch the missing images, or remove their lines."
        )
    return images


def _list(path: str) -> list[str]:
    """Returns the names in a folder.

    Raises:
        ConfigError: if it cannot be listed.
        StorageError: if the file system fails.
    """
    try:
        return read_with_retries(lambda: os.listdir(path), path)
    except OSError as error:
        raise ConfigError(f"data: folder {printable(path)} cannot be listed: {error}. Correct the path.") from error


def _number_keys(shards: TarShards) -> dict[str, int]:
    """Returns the number of each sample by its key, and by the key's last part where that is unique."""
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
