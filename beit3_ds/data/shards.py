"""Random access to the images and captions in WebDataset tar shards, without unpacking them."""

import os
import tarfile
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from beit3_ds.config import ConfigError
from beit3_ds.data.files import expand_patterns
from beit3_ds.data.images import decode_image

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Extensions of a sample's image, in lower case."""
CAPTION_EXTENSIONS = ("txt",)
"""Extension of a sample's caption."""

_KINDS = {"image": IMAGE_EXTENSIONS, "caption": CAPTION_EXTENSIONS}


class BrokenRecord(Exception):
    """One sample cannot be read; the message names its shard, its key and the reason."""


class _Member(NamedTuple):
    offset: int
    size: int


_MISSING = _Member(0, -1)


class TarShards:
    """The samples of uncompressed tar files, in the order of files and of each sample's first member.

    By WebDataset's rule the members `folder/KEY.webp` and `folder/KEY.txt` are the image and the caption of the
    sample `folder/KEY`: the key ends at the first dot of the file name. Of several images the first one counts; other
    members (`.json`) are left alone.

    Opening reads every header once (some tens of thousands a second) and keeps about 60 bytes a sample, in each
    process. Reading takes one open and one pread a member; nothing is held open, so instances may be pickled.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        """Finds the files and indexes their members.

        Raises:
            ConfigError: for a pattern without a match, or a file that is unreadable, no tar, cut off or empty.
        """
        self.paths = expand_patterns(patterns)
        scans = [_scan(path) for path in self.paths]
        self._shard = np.repeat(np.arange(len(scans), dtype=np.int32), [len(keys) for keys, _ in scans])
        self._keys = np.concatenate([keys for keys, _ in scans])
        self._members = np.concatenate([members for _, members in scans])

    def __len__(self) -> int:
        """Samples in all shards, broken ones included: what stands where must not depend on what can be read."""
        return len(self._shard)

    def name(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.paths[self._shard[index]]}:{self._keys[index].decode('utf-8', 'backslashreplace')}"

    def image(self, index: int) -> Image.Image:
        """Decodes the image of a sample, upright and in RGB.

        Raises:
            BrokenRecord: if it has none, or one that cannot be read.
        """
        data = self._read(index, "image")
        try:
            return decode_image(data)
        except ValueError as error:
            raise BrokenRecord(f"{self.name(index)}: broken image: {error}") from error

    def caption(self, index: int) -> str:
        """Returns the caption of a sample, without white space around it.

        Raises:
            BrokenRecord: if it has none, or one that is empty, not UTF-8 or cannot be read.
        """
        try:
            caption = self._read(index, "caption").decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BrokenRecord(f"{self.name(index)}: broken caption: {error}") from error
        if not caption:
            raise BrokenRecord(f"{self.name(index)}: empty caption")
        return caption

    def _read(self, index: int, kind: str) -> bytes:
        offset, size = (int(number) for number in self._members[index, list(_KINDS).index(kind)])
        if size < 0:
            raise BrokenRecord(f"{self.name(index)}: no {kind} (.{', .'.join(_KINDS[kind])})")
        try:
            with open(self.paths[self._shard[index]], "rb", buffering=0) as file:
                data = os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise BrokenRecord(f"{self.name(index)}: {error}") from error
        if len(data) < size:
            raise BrokenRecord(f"{self.name(index)}: only {len(data)} of {size} bytes left; has the shard changed?")
        return data


def _scan(path: str) -> tuple[NDArray[np.bytes_], NDArray[np.int64]]:
    """Indexes one shard.

    Returns:
        Keys, (n,) bytes, and their members, (n, 2, 2) int64: offset and size of image and caption, size -1 if missing.
    """
    samples: dict[str, list[_Member]] = {}
    try:
        for key, extension, member in _tar_members(path):
            found = samples.setdefault(key, [_MISSING] * len(_KINDS))
            for kind, extensions in enumerate(_KINDS.values()):
                if extension in extensions and found[kind] is _MISSING:
                    found[kind] = member
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(
            f"data: {path} cannot be read as an uncompressed tar shard: {error}. Fetch it again."
        ) from error
    if not samples:
        raise ConfigError(f"data: {path} holds no samples. Leave it out of the config.")
    # Bytes of one width: a list of str would take five times the memory.
    keys = np.array([key.encode("utf-8", "surrogateescape") for key in samples])
    return keys, np.array(list(samples.values()), dtype=np.int64)


def _tar_members(path: str) -> Iterator[tuple[str, str, _Member]]:
    """Yields key, extension in lower case, and place of every regular file of a tar."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            folder, _, name = info.name.rpartition("/")
            stem, _, extension = name.partition(".")
            if info.isreg() and stem:  # no stem: a hidden file, such as those that macOS adds
                yield f"{folder}/{stem}" if folder else stem, extension.lower(), _Member(info.offset_data, info.size)
        # tarfile takes a damaged header, or a file cut at the border of a member, for the end of the archive.
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset}")
