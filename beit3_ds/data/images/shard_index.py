"""Where the members of one tar shard lie: scanned from its headers, or read from an index file.

An index file is one line of JSON (the tar's size and modification time, the records' number, width and checksum, and
the members left out, by reason), then one record of fixed width per sample. Records are mapped: finding one makes no
file system call, no process copies them, and all processes of a machine share the page cache.
"""

import contextlib
import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit3_ds.atomic_file import bounded_name, written_aside
from beit3_ds.config import ConfigError
from beit3_ds.data.files.kinds import kind_of_file
from beit3_ds.data.files.open_files import OpenFiles
from beit3_ds.data.files.reading import read_with_retries, storage_error
from beit3_ds.data.images.image_source import Skipped
from beit3_ds.data.images.tar_members import TarError, TarMember, iterate_tar_members

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
"""Extensions of a sample's image, in lower case; the format itself is told by content."""
CAPTION_EXTENSIONS = ("txt", "json")
"""Extensions of a sample's caption, the first one preferred; of JSON the value of `caption`, as img2dataset writes."""
UNREAD_IMAGE_EXTENSIONS = (
    *(
        "avif",
        "heic",
        "heif",
        "jp2",
        "j2k",
        "jxl",
        "jfif",
        "svg",
        "ico",
        "psd",
        "tga",
        "ppm",
        "pgm",
        "pbm",
        "exr",
        "hdr",
    ),
    *("dng", "cr2", "nef", "arw", "raw", "eps"),
)
"""Extensions of images in formats that `images.decode_image` does not read."""
NO_MEMBER = -1
"""Size of a member that a sample does not have."""

_FORMAT = 2  # version of the file and of the rule that groups members into samples
_MAX_HEADER_BYTES = 1 << 20
_MEMBER = np.dtype([("offset", "<i8"), ("size", "<i8"), ("crc32", "<u4")])
_EXTENSIONS = (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS)


def _record_type(key_width: int) -> np.dtype[Any]:
    return np.dtype([("image", _MEMBER), ("caption", _MEMBER), ("caption_is_json", "u1"), ("key", f"S{key_width}")])


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one tar, in memory."""

    records: NDArray[np.void]
    """(samples,), a structured array: for `image` and `caption` offset and size in bytes (size `NO_MEMBER` if missing)
    and CRC-32 (0 if only headers were read); `caption_is_json`; `key`, as bytes."""
    tar_size: int
    """Bytes of the tar."""
    tar_mtime_ns: int
    """When the tar was last changed, in nanoseconds since 1970."""
    skipped: dict[str, Skipped] = field(default_factory=dict)
    """Members left out, by reason."""

    def __len__(self) -> int:
        """Samples."""
        return len(self.records)

    def record(self, index: int) -> np.void:
        """Returns the record of one sample."""
        return self.records[index]


class StoredIndex:
    """The samples of one tar, in an index file whose records are mapped at their first use."""

    def __init__(self, path: str, tar: str, files: OpenFiles | None = None) -> None:
        """Reads the header of index file `path` and checks that the tar is still the one it was made from.

        Args:
            path: the index file.
            tar: the tar.
            files: keeps the map open; None uses a new `OpenFiles`.

        Raises:
            ConfigError: if the index is damaged, or the tar's size or modification time has changed.
        """
        self.path, self._files = path, files or OpenFiles()
        try:
            with open(path, "rb") as file:
                line = file.readline(_MAX_HEADER_BYTES)
                header = json.loads(line)
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']} instead of {_FORMAT}")
            self._type = _record_type(int(header["key_width"]))
            self._start, self._length = len(line), int(header["num_samples"])
            if os.path.getsize(path) != self._start + self._length * self._type.itemsize:
                raise ValueError("cut off or overwritten")
            self._crc32, self.tar_size, self.tar_mtime_ns = (
                header[key] for key in ("records_crc32", "tar_size", "tar_mtime_ns")
            )
            self.skipped = {reason: Skipped(*found) for reason, found in header["skipped"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"data: index {path} of {tar} is damaged: {error}. Run `beit3 prepare index`.") from error
        self._check_tar(tar, (self.tar_size, self.tar_mtime_ns))

    def __len__(self) -> int:
        """Samples."""
        return self._length

    def record(self, index: int) -> np.void:
        """Returns the record of one sample.

        Raises:
            StorageError: if the index file has vanished or shrunk, or cannot be read.
        """
        return self._records()[index].copy()

    def load(self) -> NDArray[np.void]:
        """Reads all records.

        Raises:
            ConfigError: if they are not those that were written.
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
        status = _stat(tar)
        for what, now, then in zip(("size", "mtime_ns"), (status.st_size, status.st_mtime_ns), made_from, strict=True):
            if now != then:
                raise ConfigError(
                    f"data: {tar} has {what} {now}, its index {self.path} was made from {what} {then}. If the change "
                    "is meant, run `beit3 prepare index` again; else fetch the tar again."
                )


def index_path(cache_dir: str, tar: str) -> str:
    """The index file of a tar: its name and a digest of its folder, for tars of one name in several folders."""
    folder, name = os.path.split(os.path.abspath(tar))
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    return os.path.join(cache_dir, "index", f"{bounded_name(name)}.{digest}.index")


def scan_shard(tar: str, with_checksums: bool = False) -> ShardIndex:
    """Indexes a tar from its headers; with checksums it also reads images and captions. The tar may have no samples.

    The first of several members with one name, or of several images of one sample, counts.

    Raises:
        ConfigError: if the file is unreadable, not a tar, damaged, truncated, or changes while it is read.
        StorageError: if the file system fails.
    """
    before = _stat(tar)
    try:
        samples, skipped = read_with_retries(lambda: _scan(tar, with_checksums), tar)
    except (OSError, TarError) as error:
        raise ConfigError(
            f"data: {tar} cannot be read as an uncompressed tar shard: {error}. {_advice(tar)}"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (_stat(tar).st_size, _stat(tar).st_mtime_ns):
        raise ConfigError(f"data: {tar} changed while it was read. Wait until it is complete.")
    return ShardIndex(
        records=_to_records(samples), tar_size=before.st_size, tar_mtime_ns=before.st_mtime_ns, skipped=skipped
    )


def reason_to_skip(extension: str) -> str:
    """Returns why a file with this extension, in lower case, is not part of a sample."""
    is_image = extension in UNREAD_IMAGE_EXTENSIONS
    return "image in a format that is not read" if is_image else "neither image nor caption, by its extension"


def write_index(index: ShardIndex, path: str) -> None:
    """Writes an index file aside and renames it, so that it is whole or absent.

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
    with written_aside(Path(path)) as file:
        file.write(json.dumps(header).encode("ascii") + b"\n" + data)


class _Sample(NamedTuple):
    members: dict[str, tuple[int, int, int]]
    """Offset, size and CRC-32 by extension."""


class _Candidate(NamedTuple):
    """A tar member whose extension says that it belongs to a sample."""

    key: str
    """Name without the extension."""
    extension: str
    """Extension in lower case."""
    member: TarMember
    """Place in the tar."""


def _scan(tar: str, with_checksums: bool) -> tuple[dict[str, _Sample], dict[str, Skipped]]:
    """Groups the members of a tar into samples; returns them by key, and the members left out, by reason."""
    samples: dict[str, _Sample] = {}
    skipped: dict[str, Skipped] = {}
    candidates: list[_Candidate] = []

    def skip(reason: str, name: str) -> None:
        count, example = skipped.get(reason, (0, name))
        skipped[reason] = Skipped(count + 1, example)

    with open(tar, "rb", buffering=0) as file:
        for member in iterate_tar_members(file.fileno()):
            key, _, extension = member.name.rpartition(".")
            extension = extension.lower()
            if member.skip_reason:
                skip(member.skip_reason, member.name)
            elif member.name.rpartition("/")[2].startswith("."):
                skip("hidden file", member.name)  # such as those that macOS adds
            elif not key or extension not in _EXTENSIONS:
                skip(reason_to_skip(extension), member.name)
            else:
                candidates.append(_Candidate(key, extension, member))
        keys = {candidate.key for candidate in candidates}
        for candidate in candidates:
            if (first := _key_to_first_dot(candidate.key)) != candidate.key and first in keys:
                reason = "further part of a sample (KEY.PART.png beside KEY.png or KEY.txt)"
            else:
                reason = _add(samples, candidate, file.fileno() if with_checksums else None)
            if reason:
                skip(reason, candidate.member.name)
    return samples, skipped


def _key_to_first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}"


def _add(samples: dict[str, _Sample], candidate: _Candidate, descriptor: int | None) -> str:
    """Files a member under its sample; returns the reason if it is left out."""
    extension, member = candidate.extension, candidate.member
    members = samples.setdefault(candidate.key, _Sample({})).members
    if extension in members:
        return "name twice"
    if extension in IMAGE_EXTENSIONS and not members.keys().isdisjoint(IMAGE_EXTENSIONS):
        return "second image of a sample"
    crc32 = 0 if descriptor is None else _checksum(descriptor, member)
    members[extension] = (member.offset, member.size, crc32)
    return ""


def _advice(tar: str) -> str:
    """Returns advice for a file that is not a tar."""
    with contextlib.suppress(OSError):
        kind = kind_of_file(tar)
        if kind.endswith(("gzip data", "Zstandard data", "bzip2 data", "xz data", "LZ4 data")):
            return f"It holds {kind}: decompress it, since single samples are read from their places in the tar."
        if kind and kind != "a tar archive":
            return f"It holds {kind}: leave it out of the pattern."
    if tar.lower().endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet", ".txt")):
        return (
            'A file of captions needs its own format, such as "format": "conceptual_captions" with "images": '
            "FOLDER, or leave it out of the pattern (write *.tar)."
        )
    return "Fetch it again, or leave it out of the config: a tar is used whole or not at all."


def _checksum(descriptor: int, member: TarMember) -> int:
    crc32, position, end = 0, member.offset, member.offset + member.size
    while position < end:
        chunk = os.pread(descriptor, min(end - position, 1 << 22), position)
        if not chunk:
            raise TarError(f"cut off at byte {position}")
        crc32, position = zlib.crc32(chunk, crc32), position + len(chunk)
    return crc32


def _to_records(samples: dict[str, _Sample]) -> NDArray[np.void]:
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    records = np.zeros(len(keys), dtype=_record_type(max(map(len, keys), default=1)))
    records["key"] = keys
    missing = (0, NO_MEMBER, 0)
    for record, sample in zip(records, samples.values(), strict=True):
        record["image"] = next((sample.members[e] for e in IMAGE_EXTENSIONS if e in sample.members), missing)
        captions = [e for e in CAPTION_EXTENSIONS if e in sample.members]
        record["caption"] = sample.members[captions[0]] if captions else missing
        record["caption_is_json"] = captions[:1] == ["json"]
    return records


def _stat(tar: str) -> os.stat_result:
    try:
        return read_with_retries(lambda: os.stat(tar), tar)
    except OSError as error:
        raise ConfigError(f"data: {tar} cannot be read: {error}. Correct the path in the config.") from error
