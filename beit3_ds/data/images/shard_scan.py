"""Builds the index of a tar shard by grouping the tar's members into samples."""

import contextlib
import os
import zlib
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from beit3_ds.config import ConfigError
from beit3_ds.data.files.kinds import IMAGE_EXTENSIONS, UNREAD_IMAGE_EXTENSIONS, kind_of_file
from beit3_ds.data.files.reading import read_with_retries
from beit3_ds.data.files.records import Skipped
from beit3_ds.data.images.shard_index import NO_MEMBER, ShardIndex, record_type, stat_tar
from beit3_ds.data.images.tar_members import TarError, TarMember, iterate_tar_members

CAPTION_EXTENSIONS = ("txt", "json")
"""Extensions of caption files; `txt` is preferred. A JSON file stores the caption under `caption`, as in img2dataset.
"""
_EXTENSIONS = (*IMAGE_EXTENSIONS, *CAPTION_EXTENSIONS)


def scan_shard(tar: str, with_checksums: bool = False) -> ShardIndex:
    """Builds the index of a tar from the tar's headers; the index may be empty.

    If several members have the same name, or a sample has several images, the first one is used.

    Args:
        tar: path of the tar.
        with_checksums: whether to read all images and captions and compute their CRC-32 checksums.

    Raises:
        ConfigError: if the file is unreadable, not a tar, damaged or truncated, or changes during the scan.
        StorageError: if the file system fails.
    """
    before = stat_tar(tar)
    try:
        samples, skipped = read_with_retries(lambda: _scan(tar, with_checksums), tar)
    except (OSError, TarError) as error:
        raise ConfigError(
            f"data: {tar} cannot be read as an uncompressed tar shard: {error}. {_advice(tar)}"
        ) from error
    if (before.st_size, before.st_mtime_ns) != (stat_tar(tar).st_size, stat_tar(tar).st_mtime_ns):
        raise ConfigError(f"data: {tar} changed while it was read. Wait until it is complete.")
    return ShardIndex(
        records=_to_records(samples), tar_size=before.st_size, tar_mtime_ns=before.st_mtime_ns, skipped=skipped
    )


def reason_to_skip(extension: str) -> str:
    """Returns the reason, for messages, why a file with this lower-case extension is skipped."""
    is_image = extension in UNREAD_IMAGE_EXTENSIONS
    return "image in a format that is not read" if is_image else "neither image nor caption, by its extension"


class _Sample(NamedTuple):
    """Holds the members of one sample."""

    members: dict[str, tuple[int, int, int]]
    """Maps each member's extension to the member's offset in bytes, size in bytes, and CRC-32 checksum."""


class _Candidate(NamedTuple):
    """Describes a tar member with the extension of an image or a caption."""

    key: str
    """Path of the member without its extension."""
    extension: str
    """Extension in lower case."""
    member: TarMember
    """The member, with the offset and size of its data in bytes."""


def _scan(tar: str, with_checksums: bool) -> tuple[dict[str, _Sample], dict[str, Skipped]]:
    """Groups the members of a tar into samples; returns the samples by key, and the skipped members by reason."""
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
                skip("hidden file", member.name)  # macOS adds some
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
    """Adds a member to its sample; returns the reason if the member is skipped, otherwise an empty string."""
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
    """Returns advice for the error message about a file that is not a valid tar."""
    with contextlib.suppress(OSError):
        kind = kind_of_file(tar)
        if kind.endswith(("gzip data", "Zstandard data", "bzip2 data", "xz data", "LZ4 data")):
            return f"It holds {kind}: decompress it, because samples are read at random offsets of the tar."
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
            raise TarError(f"truncated at byte {position}")
        crc32, position = zlib.crc32(chunk, crc32), position + len(chunk)
    return crc32


def _to_records(samples: dict[str, _Sample]) -> NDArray[np.void]:
    keys = [key.encode("utf-8", "surrogateescape") for key in samples]
    records = np.zeros(len(keys), dtype=record_type(max(map(len, keys), default=1)))
    records["key"] = keys
    missing = (0, NO_MEMBER, 0)
    for record, sample in zip(records, samples.values(), strict=True):
        record["image"] = next((sample.members[e] for e in IMAGE_EXTENSIONS if e in sample.members), missing)
        captions = [e for e in CAPTION_EXTENSIONS if e in sample.members]
        record["caption"] = sample.members[captions[0]] if captions else missing
        record["caption_is_json"] = captions[:1] == ["json"]
    return records
