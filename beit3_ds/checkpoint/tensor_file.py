"""Safetensors files written tensor after tensor, so that no file has to fit in memory.

The library's own writer takes all tensors at once and gives no digest; files are read with the library.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.disk import NewFile

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


class TensorEntry(NamedTuple):
    """A tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WrittenFile(NamedTuple):
    """A file that lies on the disk."""

    num_bytes: int
    sha256: str


def write_tensor_file(
    path: Path, entries: Sequence[TensorEntry], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> WrittenFile:
    """Writes a new safetensors file and syncs it.

    Args:
        path: must not exist.
        entries: what the file will hold, in this order.
        read: gives the tensor of a name; called once for each, one after the other, and nothing is kept of it.
        metadata: strings for the file's header.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with NewFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name} is not what was announced"
            file.write(_bytes_of(tensor))
    return WrittenFile(file.num_bytes, file.sha256)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return memoryview(flat.view(torch.uint8).numpy())
