"""Reads image files in a folder, and caption files next to the images."""

import heapq
import os
from collections.abc import Iterator

from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files.fingerprint import SourceFile
from beit3_ds.data.files.folder import Folder
from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS
from beit3_ds.data.files.reading import FILE_ERRORS, read_with_retries
from beit3_ds.data.files.records import BrokenRecordError, Skipped
from beit3_ds.data.images.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, decode_caption, decode_json_caption
from beit3_ds.data.images.compact_strings import CompactStrings
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES, decode_image
from beit3_ds.data.images.shard_scan import reason_to_skip
from beit3_ds.printing import printable

_CAPTIONS = ("txt", "TXT", "json", "JSON")  # the first that exists is read

_SIZES_LOOKED_UP = 1024
"""Maximum number of images, evenly spread, whose file sizes are looked up. A million lookups on a network take minutes.
"""


class ImageFolder:
    """Lists the images below a folder, sorted by path.

    The caption of `NAME.jpg` is the text in `NAME.txt`, or else the value of `caption` in `NAME.json`. Captions may be
    missing.

    Symbolic links to folders are followed, because ImageNet's class folders are often links. Each folder is listed
    once. Hidden files are not read. A link to a file is only read if the file is in the folder. `skipped` counts all
    skipped files and folders. Each path takes 8 bytes in addition to its text.
    """

    def __init__(self, path: str) -> None:
        """Lists the folder; opens no image.

        Raises:
            ConfigError: if the path is not a folder, if the folder cannot be read, or if the folder contains no image.
            StorageError: if the file system fails.
        """
        self._folder = open_folder(path)
        self.path = self._folder.path
        self._names, self.skipped = list_images(self._folder)

    def __len__(self) -> int:
        """Returns the number of images, including broken images."""
        return len(self._names)

    def files(self) -> Iterator[SourceFile]:
        """Yields a description of each image, sorted by path.

        At most 1024 evenly spread descriptions contain the file size. In all others, the size is None.
        """
        every = -(-len(self) // _SIZES_LOOKED_UP)
        for number in range(len(self)):
            name = self._names[number]
            num_bytes = None if number % every else _size(os.path.join(self.path, name))
            yield SourceFile(name, num_bytes, 1)

    def name(self, index: int) -> str:
        """Returns the full path of an image, for messages."""
        return printable(os.path.join(self.path, self._names[index]))

    def relative_path(self, index: int) -> str:
        """Returns the path of an image relative to the folder."""
        return self._names[index]

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes an image, upright and in RGB; `min_side` is explained in `decoding.decode_image`.

        Raises:
            BrokenRecordError: if the image cannot be read.
            StorageError: if the file system fails.
        """
        try:
            return read_image(self._folder, self._names[index], min_side)
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken image: {error}") from error

    def header_size(self, index: int) -> tuple[int, int] | None:
        """Returns the width and height of an image in pixels, without decoding it; None if it cannot be read."""
        return header_size(self._folder, self._names[index])

    def caption(self, index: int) -> str:
        """Returns the caption of an image, without surrounding white space.

        Raises:
            BrokenRecordError: if the image has no caption, or the caption cannot be read.
            StorageError: if the file system fails.
        """
        stem = os.path.splitext(self._names[index])[0]
        found = (f"{stem}.{extension}" for extension in _CAPTIONS)
        name = next(filter(self._exists, found), f"{stem}.{_CAPTIONS[0]}")
        try:
            if name.lower().endswith("json"):
                return decode_json_caption(self._folder.read(name, MAX_JSON_BYTES))
            return decode_caption(self._folder.read(name, MAX_CAPTION_BYTES))
        except ValueError as error:
            raise BrokenRecordError(f"{self.name(index)}: broken caption: {error}") from error

    def pair(self, index: int, min_side: int | None = None) -> tuple[Image.Image, str]:
        """Returns the image and the caption of a sample.

        Raises:
            BrokenRecordError: if the image or the caption is missing or cannot be read.
            StorageError: if the file system fails.
        """
        caption = self.caption(index)  # first, because it is cheaper to read than the image
        return self.image(index, min_side), caption

    def _exists(self, name: str) -> bool:
        return os.path.lexists(os.path.join(self.path, name))


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:  # counts as a broken record once it is read
        return None


def open_folder(path: str) -> Folder:
    """Opens a folder of images.

    Raises:
        ConfigError: if the path is not a folder, or the folder cannot be read.
        StorageError: if the file system fails.
    """
    try:
        return Folder(path)
    except OSError as error:
        raise ConfigError(
            f"data: folder {printable(path)} cannot be listed: {error}. Correct the path in the config."
        ) from error


def list_images(folder: Folder) -> tuple[CompactStrings, dict[str, Skipped]]:
    """Returns the sorted paths of all images below a folder, and the skipped files by reason.

    Raises:
        ConfigError: if a subfolder cannot be read, or the folder contains no image.
        StorageError: if the file system fails.
    """
    listing = _Listing(folder)
    try:
        listing.walk()
    except OSError as error:
        raise ConfigError(
            f"data: folder {printable(folder.path)} cannot be listed: {error}. Make it readable, or move it."
        ) from error
    if not listing.names:
        skipped = "; ".join(
            f"{found.num_members:,} left out, {reason} ({printable(found.example)})"
            for reason, found in listing.skipped.items()
        )
        raise ConfigError(
            f"data: there is no image ({', '.join(IMAGE_EXTENSIONS)}) below {printable(folder.path)}"
            f"{f': {skipped}' if skipped else ''}. Correct the path in the config."
        )
    return CompactStrings(sorted(listing.names)), listing.skipped


def read_image(folder: Folder, name: str, min_side: int | None) -> Image.Image:
    """Reads and decodes the image `name` in a folder; `min_side` is explained in `decoding.decode_image`.

    Raises:
        ValueError: if the image cannot be read, or is outside the folder.
        StorageError: if the file system fails.
    """
    return decode_image(folder.read(name, MAX_IMAGE_BYTES), min_side)


def header_size(folder: Folder, name: str) -> tuple[int, int] | None:
    """Returns the width and height in the header of an image file; None if the file is not a readable image.

    Opens only regular files inside the folder, because opening a pipe would wait for its other end.
    """
    if not folder.holds(name):
        return None
    try:
        with Image.open(os.path.join(folder.path, name)) as image:
            return image.size
    except Exception:  # decoders raise nearly anything on corrupt bytes
        return None


class _Listing:
    """Lists the files below a folder; lists each subfolder once, even if links give it several paths."""

    def __init__(self, folder: Folder) -> None:
        self.names: list[str] = []
        self.skipped: dict[str, Skipped] = {}
        self._folder = folder
        self._seen: set[tuple[int, int]] = set()
        self._folders = [""]
        self._links: list[str] = []  # a heap, because the order of links must not depend on the file system

    def walk(self) -> None:
        while self._folders or self._links:
            inside = self._folders.pop() if self._folders else heapq.heappop(self._links)
            path = os.path.join(self._folder.path, inside)
            status = read_with_retries(lambda path=path: os.stat(path), path)  # type: ignore[misc]
            if (status.st_dev, status.st_ino) in self._seen:
                self._skip("folder that was listed by another path", inside)
                continue
            self._seen.add((status.st_dev, status.st_ino))
            self._list(inside, read_with_retries(lambda path=path: _entries(path), path))  # type: ignore[misc]

    def _list(self, inside: str, entries: list[os.DirEntry[str]]) -> None:
        images: set[str] = set()
        texts: set[tuple[str, str]] = set()
        for entry in entries:
            name, (stem, _, own_extension) = os.path.join(inside, entry.name), entry.name.rpartition(".")
            extension = own_extension.lower()
            if entry.name.startswith("."):
                self._skip("hidden file or folder", name)
            elif _is_folder(entry):
                if entry.is_symlink():
                    heapq.heappush(self._links, name)
                else:
                    self._folders.append(name)
            elif extension in IMAGE_EXTENSIONS:
                if self._add_image(entry, name):
                    images.add(stem)
            elif own_extension in _CAPTIONS:
                texts.add((stem, own_extension))
            else:
                self._skip(reason_to_skip(extension), name)
        for stem, extension in texts:
            name = os.path.join(inside, f"{stem}.{extension}")
            if stem not in images:
                self._skip("text or JSON file without an image", name)
            elif extension.isupper() and (stem, extension.lower()) in texts:
                self._skip("second caption of an image", name)

    def _add_image(self, entry: os.DirEntry[str], name: str) -> bool:
        path = os.path.join(self._folder.path, name)
        if entry.is_symlink() and not (self._folder.contains(name) and os.path.isfile(path)):
            self._skip("link to a file out of the folder, or to no file", name)
        elif not entry.is_symlink() and not entry.is_file():
            self._skip("no plain file", name)
        else:
            self.names.append(name)
            return True
        return False

    def _skip(self, reason: str, example: str) -> None:
        count, first = self.skipped.get(reason, (0, example))
        self.skipped[reason] = Skipped(count + 1, min(first, example))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself
        if error.errno in FILE_ERRORS:
            return False
        raise
