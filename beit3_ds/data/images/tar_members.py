"""Reads the members of an uncompressed tar file, header by header.

This module parses ustar, GNU and pax headers and reports damage. The standard library's `tarfile` treats a damaged
header as the end of the archive, ignores appended archives, and trusts any size in a header.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from beit3_ds.data.files.gaps import next_written

_BLOCK = 512
_MAX_EXTENDED_SIZE = 1 << 20  # maximum bytes of a long name or a pax header; usual ones have some hundred
_CHECKSUM = slice(148, 156)
_OCTAL = re.compile(rb" *([0-7]*)[ \0]*")
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
_NOT_FILES = {b"1": "link", b"2": "link", b"3": "special file", b"4": "special file", b"6": "special file"}


class TarError(Exception):
    """Reports a damaged or truncated tar file; the message names the byte position."""


class TarMember(NamedTuple):
    """Describes a tar member other than a folder."""

    name: str
    """Path of the member in the tar; bytes that are not valid UTF-8 become surrogate escapes."""
    offset: int
    """Offset of the member's data in the tar, in bytes."""
    size: int
    """Size of the member's data, in bytes."""
    skip_reason: str
    """Reason to skip the member (`link`, `special file`, `sparse file` or `unsafe name`); empty for a plain file."""


class _Extended(NamedTuple):
    """Holds the fields of GNU and pax extended headers, which apply to the next member."""

    name: bytes | None = None
    size: int | None = None
    is_sparse: bool = False


def iterate_tar_members(descriptor: int) -> Iterator[TarMember]:
    """Yields all members of an open tar file except folders, in order; reads only headers and never follows links.

    Memory and time are bounded by the size of the file.

    Raises:
        TarError: if a header is damaged, if the file is truncated, or if the end-of-archive block is missing or
            followed by data.
    """
    file_size = os.fstat(descriptor).st_size
    position, extended = 0, _Extended()
    while True:
        block = os.pread(descriptor, _BLOCK, position)
        if len(block) < _BLOCK:
            raise TarError(f"truncated at byte {position}: the end-of-archive block is missing")
        if not any(block):
            break
        _check_header(block, position)
        kind, size = block[156:157], _number(block[124:136], position)
        data = position + _BLOCK
        if kind in b"LKxXg":
            position = data + _padded(size)
            extended = _read_extended(descriptor, kind, data, size, extended)
            continue
        if kind == b"S":
            data = _end_of_sparse_map(descriptor, block, data)
        member = _member(block, kind, data, size, extended)
        has_data = kind not in b"123456"  # links, devices, folders and pipes have only a header, whatever its size
        if has_data and data + member.size > file_size:
            raise TarError(f"truncated at byte {file_size}, in the data of {member.name!r}")
        position = data + _padded(member.size) if has_data else data
        extended = _Extended()
        if kind != b"5" and not (kind == b"\0" and member.name.endswith("/")):
            yield member
    if extended != _Extended():
        raise TarError(f"damaged at byte {position}: an extended header without its member")
    _check_end(descriptor, position, file_size)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _check_header(block: bytes, position: int) -> None:
    stored = _number(block[_CHECKSUM], position)
    rest = block[: _CHECKSUM.start] + block[_CHECKSUM.stop :]
    unsigned = sum(rest) + 8 * ord(" ")
    # Some old writers summed signed bytes.
    if stored != unsigned and stored != unsigned - 256 * sum(byte > 127 for byte in rest):
        raise TarError(f"damaged at byte {position}: the checksum of the header is wrong")


def _number(field: bytes, position: int) -> int:
    if field[0] == 0x80:  # binary form of GNU, for sizes above 8 GiB
        return int.from_bytes(field[1:], "big")
    match = _OCTAL.fullmatch(field)
    if match is None:
        raise TarError(f"damaged at byte {position}: {field!r} is not a number")
    return int(match[1] or b"0", 8)


def _member(block: bytes, kind: bytes, data: int, size: int, extended: _Extended) -> TarMember:
    raw_name = block[:100].partition(b"\0")[0]
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    if prefix:
        raw_name = prefix + b"/" + raw_name
    if extended.name is not None:
        raw_name = extended.name
    name = raw_name.decode("utf-8", "surrogateescape")
    reason = _NOT_FILES.get(kind, "")
    if kind == b"S" or extended.is_sparse:
        reason = "sparse file"  # its data are not the bytes of the file
    elif kind not in b"\x0007" and not reason:
        reason = "special file"
    elif name.startswith("/") or ".." in name.split("/") or "\0" in name:
        reason = reason or "unsafe name"
    return TarMember(name, data, size if extended.size is None else extended.size, reason)


def _read_extended(descriptor: int, kind: bytes, data: int, size: int, extended: _Extended) -> _Extended:
    if size > _MAX_EXTENDED_SIZE:
        raise TarError(f"damaged at byte {data}: an extended header of {size} bytes")
    content = os.pread(descriptor, size, data)
    if len(content) < size:
        raise TarError(f"truncated in the extended header at byte {data}")
    if kind == b"L":
        return extended._replace(name=content.partition(b"\0")[0])
    if kind == b"K":  # the target of a link
        return extended
    records = _pax_records(content, data)
    found = _Extended(
        name=records.get(b"path", extended.name),
        size=_pax_size(records[b"size"], data) if b"size" in records else extended.size,
        is_sparse=extended.is_sparse or any(key.startswith(b"GNU.sparse.") for key in records),
    )
    if kind != b"g":
        return found
    if found != extended:
        raise TarError(f"at byte {data}: a global header that names or sizes all members")
    return extended


def _pax_size(value: bytes, position: int) -> int:
    if not (value.isdigit() and len(value) <= 20):
        raise TarError(f"damaged at byte {position}: {value!r} is not a number")
    return int(value)


def _pax_records(content: bytes, position: int) -> dict[bytes, bytes]:
    records: dict[bytes, bytes] = {}
    start = 0
    while start < len(content) and content[start]:  # some writers pad with NULs
        match = _PAX_RECORD.match(content, start)
        end = start + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1] != ord("\n"):
            raise TarError(f"damaged at byte {position + start}: no record of an extended header")
        records[match[2]] = content[match.end() : end - 1]
        start = end
    return records


def _end_of_sparse_map(descriptor: int, block: bytes, data: int) -> int:
    more = block[482:483]
    while more not in (b"", b"\0"):
        more = os.pread(descriptor, 1, data + 504)
        data += _BLOCK
    return data


def _check_end(descriptor: int, position: int, file_size: int) -> None:
    while (position := next_written(descriptor, position, file_size)) < file_size:
        chunk = os.pread(descriptor, 1 << 20, position)
        if not chunk:
            break
        if any(chunk):
            raise TarError(
                f"data behind the end-of-archive block at byte {position}: a damaged header, or a second tar appended"
            )
        position += len(chunk)
