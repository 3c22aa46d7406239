"""Stores the index of one tar shard: the offsets and sizes of each sample's image and caption.

An index file starts with one line of JSON: size and modification time of the tar, the skipped members, and the number,
key width and checksum of the records. One fixed-width record per sample follows. Records are memory-mapped, so all
processes of a host share them.
"""

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import atomic_write, bounded_name
from beit3_ds.config import ConfigError
from beit3_ds.data.files.descriptors import OpenFiles
from beit3_ds.data.files.reading import read_with_retries, storage_error
from beit3_ds.data.files.records import Skipped
from beit3_ds.regular_file import open_regular
from beit3_ds.untrusted_json import check_count, check_list, check_object, check_text, parse_untrusted_json

NO_MEMBER = -1
"""Size that marks a missing image or caption in a record."""

_FORMAT = 2  # version of the file format, and of the rule that groups members into samples
_MAX_HEADER_BYTES = 1 << 20
_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])


def record_type(key_width: int) -> np.dtype[Any]:
    """Returns the NumPy type of index records whose keys have at most `key_width` bytes."""
    return np.dtype([("image", _MEMBER), ("caption", _MEMBER), ("caption_is_json", "u1"), ("key", f"S{key_width}")])


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Holds the index of one tar in memory."""

    records: NDArray[np.void]
    """Structured array, (samples,), with the fields `image`, `caption`, `caption_is_json` and `key` (bytes).

    `image` and `caption` contain an offset in bytes, a size in bytes and a CRC-32 checksum. The size is `NO_MEMBER` if
    the image or caption is missing. The checksum is 0 if it was not computed.
    """
    tar_size: int
    """Size of the tar in bytes."""
    tar_mtime_ns: int
    """Modification time of the tar, in nanoseconds since 1970."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Number of skipped tar members for each reason, with an example."""

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.records)

    def record(self, index: int) -> np.void:
        """Returns the record of one sample."""
        return self.records[index]


class StoredIndex:
    """Reads the index of one tar from an index file; memory-maps the records when they are first needed."""

    def __init__(self, path: str, tar: str, files: OpenFiles | None = None) -> None:
        """Reads the header of an index file and checks that the tar has not changed since the index was written.

        Args:
            path: path of the index file.
            tar: path of the tar.
            files: cache that keeps the memory map; None creates a new cache.

        Raises:
            ConfigError: if the index is damaged, or the tar's size or modification time has changed.
        """
        self.path, self._files = path, files or OpenFiles()
        try:
            self._start, header = read_first_line(path, _FORMAT)
            self._type = record_type(_check_width(header["key_width"]))
            self._length = check_count(header["num_samples"])
            if os.path.getsize(path) != self._start + self._length * self._type.itemsize:
                raise ValueError("truncated or overwritten")
            self._crc32, self.tar_size, self.tar_mtime_ns = (
                check_count(header[key]) for key in ("records_crc32", "tar_size", "tar_mtime_ns")
            )
            self.skipped = parse_skipped(header["skipped"])
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"data: index {path} of {tar} is damaged: {error}. Run `beit3 prepare index`.") from error
        self._check_tar(tar, (self.tar_size, self.tar_mtime_ns))

    def __len__(self) -> int:
        """Returns the number of samples."""
        return self._length

    def record(self, index: int) -> np.void:
        """Returns the record of one sample.

        Raises:
            StorageError: if the index file no longer exists, has shrunk, or cannot be read.
        """
        return self._records()[index].copy()

    def load(self) -> NDArray[np.void]:
        """Returns a copy of all records, and verifies their checksum.

        Raises:
            ConfigError: if the checksum of the records is wrong.
        """
        records = self._records().copy()
        if zlib.crc32(records.tobytes()) != self._crc32:
            raise ConfigError(f"data: index {self.path} is damaged: checksum. Delete it and run `beit3 prepare index`.")
        return records

    def _records(self) -> NDArray[np.void]:
        size = self._start + self._length * self._type.itemsize
        try:
            data = read_with_retries(lambda: self._files.map(self.path, size), self.path, file_errors=frozenset())
        except OSError as error:
            raise storage_error(self.path, error, attempts=1) from error
        return data[self._start :].view(self._type)

    def _check_tar(self, tar: str, made_from: tuple[int, int]) -> None:
        status = stat_tar(tar)
        for what, now, then in zip(("size", "mtime_ns"), (status.st_size, status.st_mtime_ns), made_from, strict=True):
            if now != then:
                raise ConfigError(
                    f"data: {tar} has {what} {now}, its index {self.path} was made from {what} {then}. If the change "
                    "is meant, run `beit3 prepare index` again; else fetch the tar again."
                )


def read_first_line(path: str, version: int) -> tuple[int, dict[str, Any]]:
    """Reads the JSON header in the first line of an index file or annotation table.

    Args:
        path: path of the file.
        version: required version of the file format.

    Returns:
        Length of the line in bytes, and the JSON object.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the line is not a JSON object, or the file has another version.
        KeyError: if the object has no version.
    """
    with open(open_regular(path), "rb") as file:
        line = file.readline(_MAX_HEADER_BYTES)
    header = check_object(parse_untrusted_json(line))
    if header["format"] != version:
        raise ValueError(f"format {str(header['format'])[:20]} instead of {version}")
    return len(line), header


def parse_skipped(value: Any) -> dict[str, Skipped]:
    """Parses the counts and examples of skipped items, by reason, from the header of an index or annotation table.

    Raises:
        ValueError: if the value has another form.
    """
    skipped = {}
    for reason, found in check_object(value).items():
        count, example = check_list(found, 2)
        skipped[reason] = Skipped(check_count(count), check_text(example))
    return skipped


def _check_width(value: Any) -> int:
    width = check_count(value)
    if not 1 <= width <= _MAX_HEADER_BYTES:
        raise ValueError(f"keys of {width} bytes")
    return width


def index_path(cache_dir: str, tar: str) -> str:
    """Returns the path of a tar's index file, `cache_dir`/index/NAME.DIGEST.index.

    NAME is the tar's file name. DIGEST is computed from the tar's folder.
    """
    folder, name = os.path.split(os.path.abspath(tar))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return os.path.join(cache_dir, "index", f"{bounded_name(name)}.{digest}.index")


def write_index(index: ShardIndex, path: str) -> None:
    """Writes an index file atomically: other processes never see an incomplete file.

    Raises:
        OSError: if the folder cannot be written.
    """
    data = index.records.tobytes()
    header = {
        "format": _FORMAT,
        "tar_size": index.tar_size,
        "tar_mtime_ns": index.tar_mtime_ns,
        "num_samples": len(index),
        "key_width": index.records.dtype["key"].itemsize,
        "records_crc32": zlib.crc32(data),
        "skipped": index.skipped,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(Path(path)) as file:
        file.write(json.dumps(header).encode("ascii") + b"\n" + data)


def stat_tar(tar: str) -> os.stat_result:
    """Returns the file status of a tar, such as its size and modification time.

    Raises:
        ConfigError: if the tar is missing or inaccessible.
        StorageError: if the file system fails.
    """
    try:
        return read_with_retries(lambda: os.stat(tar), tar)
    except OSError as error:
        raise ConfigError(f"data: {tar} cannot be read: {error}. Correct the path in the config.") from error
