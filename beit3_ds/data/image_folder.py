"""Images that lie as files in a folder, and captions beside them."""

import os
import stat
from collections.abc import Iterator

from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.captions import MAX_CAPTION_BYTES, decode_caption
from beit3_ds.data.compact_strings import CompactStrings
from beit3_ds.data.image_source import BrokenRecord, Skipped
from beit3_ds.data.images import MAX_IMAGE_BYTES, decode_image
from beit3_ds.data.shard_index import IMAGE_EXTENSIONS


class ImageFolder:
    """The images below a folder, sorted by path; the caption of `NAME.jpg` is in `NAME.txt`, if there is one.

    Hidden files and folders are left out. Links to folders are not followed, and nothing is read that lies outside the
    folder: files that are links out of it are left out and counted, as are dangling ones. Paths are kept at 8 bytes
    beside their text.
    """

    def __init__(self, path: str) -> None:
        """Lists the folder; opens no image.

        Raises:
            ConfigError: if it is no folder or cannot be read, or no image lies in it.
        """
        self.path = os.path.realpath(path)
        self._names, self.skipped = list_images(self.path)

    def __len__(self) -> int:
        """Images, broken ones included."""
        return len(self._names)

    def name(self, index: int) -> str:
        """Path of an image."""
        return printable(os.path.join(self.path, self._names[index]))

    def image(self, index: int, min_side: int | None = None) -> Image.Image:
        """Decodes an image, upright and in RGB.

        Raises:
            BrokenRecord: if it cannot be read.
        """
        try:
            return read_image(self.path, self._names[index], min_side)
        except ValueError as error:
            raise BrokenRecord(f"{self.name(index)}: broken image: {error}") from error

    def caption(self, index: int) -> str:
        """Returns the caption of an image, without white space around it.

        Raises:
            BrokenRecord: if it has none, or one that cannot be read.
        """
        name = os.path.splitext(self._names[index])[0] + ".txt"
        try:
            return decode_caption(read_file(self.path, name, MAX_CAPTION_BYTES))
        except ValueError as error:
            raise BrokenRecord(f"{self.name(index)}: broken caption: {error}") from error


def list_images(folder: str) -> tuple[CompactStrings, dict[str, Skipped]]:
    """Lists the images below a folder by their paths in it, sorted, and what was left out.

    Raises:
        ConfigError: if it is no folder or cannot be read, or no image lies in it.
    """
    names: list[str] = []
    links: list[str] = []
    try:
        for name in _walk(folder):
            path = os.path.join(folder, name)
            is_file_inside = not os.path.islink(path) or (is_inside(folder, name) and os.path.isfile(path))
            (names if is_file_inside else links).append(name)
    except OSError as error:
        raise ConfigError(
            f"data: folder {folder} cannot be listed: {error}. Correct the path in the config."
        ) from error
    if not names:
        raise ConfigError(
            f"data: no image ({', '.join(IMAGE_EXTENSIONS)}) lies below {folder}. Correct the path in the config."
        )
    skipped = {"link out of the folder, or to no file": Skipped(len(links), printable(min(links)))} if links else {}
    return CompactStrings(sorted(names)), skipped


def read_image(folder: str, name: str, min_side: int | None) -> Image.Image:
    """Decodes the image `name` in a folder, which must be a real path, as `decode_image` does.

    Raises:
        ValueError: if it cannot be read, or lies outside.
    """
    return decode_image(read_file(folder, name, MAX_IMAGE_BYTES), min_side)


def read_file(folder: str, name: str, limit: int) -> bytes:
    """Reads the file `name` in a folder, which must be a real path.

    Raises:
        ValueError: if it lies outside the folder (by `..`, as an absolute path or through a link), is no plain file, is
            longer than `limit` bytes or cannot be read.
    """
    try:
        return _read_file(folder, name, limit)
    except OSError as error:  # its text names the file, which would make every message another reason
        raise ValueError(error.strerror) from error


def is_inside(folder: str, name: str) -> bool:
    """Whether `name` in a folder, which must be a real path, lies in it after all links.

    Raises:
        ValueError: for a name with NUL.
    """
    return os.path.realpath(os.path.join(folder, name)).startswith(os.path.join(folder, ""))


def printable(path: str) -> str:
    """A path for messages: bytes that are not UTF-8 are spelled out."""
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def _read_file(folder: str, name: str, limit: int) -> bytes:
    if not is_inside(folder, name):
        raise ValueError(f"it leads out of the folder {folder}")
    # Opening a pipe would wait for its other end.
    with open(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("no plain file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes exceed the limit of {limit}")
        return file.read(limit)


def _walk(folder: str) -> Iterator[str]:
    """Yields the paths of files with an image's extension, without opening them; devices and pipes left out."""
    pending = [""]
    while pending:
        inside = pending.pop()
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                name = os.path.join(inside, entry.name)
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name)
                elif entry.name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS and (
                    entry.is_symlink() or entry.is_file(follow_symlinks=False)
                ):
                    yield name
