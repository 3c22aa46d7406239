"""Reads and checks the header of a safetensors file, before any code reads the tensors."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from beit3_ds.regular_file import open_regular
from beit3_ds.untrusted_json import (
    MAX_JSON_BYTES,
    check_count,
    check_list,
    check_object,
    check_text,
    parse_untrusted_json,
)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""PyTorch dtypes, by their names in safetensors files."""
METADATA_KEY = "__metadata__"

_LENGTH_BYTES = 8
_MAX_ELEMENTS = 2**62


class StoredTensor(NamedTuple):
    """Describes a tensor in a safetensors file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of the tensor's first byte in the file."""


class Header(NamedTuple):
    """Holds a checked header. The tensors fill the rest of the file without gaps or overlaps."""

    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]


def check_safetensors(path: str | Path) -> Header:
    """Reads and checks the header of a safetensors file, without reading the tensors.

    Raises:
        OSError: if the path is not a regular file or cannot be read.
        ValueError: if the header is invalid (`read_header`).
    """
    descriptor = open_regular(path)
    try:
        return read_header(descriptor)
    finally:
        os.close(descriptor)


def read_header(descriptor: int) -> Header:
    """Reads and checks the header of an open safetensors file.

    Args:
        descriptor: file descriptor.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a field has an invalid type or value, or the file's size does not match the header; the message
            gives the reason.
    """
    size = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, _LENGTH_BYTES, 0)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
        raise ValueError("it ends within its header")
    content = check_object(parse_untrusted_json(_read(descriptor, length)))
    metadata = check_object(content.pop(METADATA_KEY, {}))
    for value in metadata.values():
        check_text(value)
    data = _LENGTH_BYTES + length
    ranges, tensors = [], {}
    for name, entry in content.items():
        try:
            dtype, shape, start, stop = _parse_entry(entry)
        except (ValueError, KeyError) as error:
            raise ValueError(f"the entry of {name[:80]!r} is wrong: {error}") from None
        ranges.append((start, stop))
        tensors[name] = StoredTensor(dtype, shape, data + start)
    end = 0
    for start, stop in sorted(ranges):
        if start != end:
            raise ValueError("its tensors overlap or leave a gap")
        end = stop
    if data + end != size:
        raise ValueError(f"it has {size} bytes instead of {data + end}")
    return Header(metadata, tensors)


def _read(descriptor: int, length: int) -> bytes:
    if length > MAX_JSON_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_JSON_BYTES}")
    return os.pread(descriptor, length, _LENGTH_BYTES)


def _parse_entry(entry: Any) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    entry = check_object(entry)
    if entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError("it has other fields than dtype, shape and data_offsets")
    name = check_text(entry["dtype"])
    if name not in DTYPES:
        raise ValueError(f"the type {name[:20]!r} is unknown")
    shape = tuple(check_count(value) for value in check_list(entry["shape"]))
    start, stop = (check_count(value) for value in check_list(entry["data_offsets"], 2))
    if len(shape) > 64:
        raise ValueError(f"it has {len(shape)} dimensions")
    count = 1
    for value in shape:
        count *= value
        if count > _MAX_ELEMENTS:
            raise ValueError("it has more elements than any file")
    if stop - start != count * DTYPES[name].itemsize:
        raise ValueError(f"{count} elements of {name} do not take {stop - start} bytes")
    return DTYPES[name], shape, start, stop
