"""Writes and reads safetensors files piece by piece, so that a file may be larger than memory.

The safetensors library needs all tensors of a new file at once, and computes no digest. The library also memory-maps
files for reading, so reading a truncated file kills the process.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.disk import NewFile
from beit3_ds.checkpoint.slices import matrix_shape
from beit3_ds.regular_file import open_regular
from beit3_ds.safetensors_header import DTYPES, read_header

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


class TensorEntry(NamedTuple):
    """Name, dtype and shape of a tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WrittenFile(NamedTuple):
    """Size in bytes and SHA-256 digest of a written file."""

    num_bytes: int
    sha256: str


def write_tensor_file(
    path: Path,
    entries: Sequence[TensorEntry],
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
    *,
    with_digest: bool = True,
) -> WrittenFile:
    """Writes a new safetensors file and syncs it.

    Args:
        path: path of the file, which must not exist.
        entries: tensors of the file, in order.
        read: function that takes a tensor's name and returns the tensor's elements in row-major order, in blocks of any
            shape. It is called once per tensor, in order; each block is freed after it is written.
        metadata: strings to store in the header.
        with_digest: whether to compute the SHA-256 digest; if false, the digest in the result is empty.

    Raises:
        OSError: if the file exists or cannot be written, for example because the disk is full.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        size = torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with NewFile(path, with_digest=with_digest) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            missing = torch.Size(shape).numel()
            for block in read(name):
                assert block.dtype == dtype, f"{name} is {block.dtype} instead of {dtype}"
                file.write(_bytes_of(block.cpu().contiguous()))
                missing -= block.numel()
            assert missing == 0, f"{missing} of the announced elements of {name} are missing"
    return WrittenFile(file.num_bytes, file.sha256)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous CPU tensor."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


class BrokenTensorFileError(ValueError):
    """Reports a file that is not a safetensors file, is truncated, or lacks a tensor."""


class TensorFile:
    """Reads tensors, or rows of tensors, from a safetensors file."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            BrokenTensorFileError: if the file is not a complete safetensors file.
            OSError: if the file cannot be read.
        """
        self.path = path
        self._descriptor = open_regular(path, follow_links=False)
        try:
            header = read_header(self._descriptor)
        except ValueError as error:
            os.close(self._descriptor)
            raise BrokenTensorFileError(f"{path} is not a whole safetensors file: {error}") from None
        self.metadata = header.metadata
        self._starts = {name: tensor.start for name, tensor in header.tensors.items()}
        self.entries = {name: TensorEntry(name, found.dtype, found.shape) for name, found in header.tensors.items()}
        """Name, dtype and shape of each tensor in the file, by name."""

    def read(self, name: str) -> Tensor:
        """Returns a whole tensor.

        Raises:
            BrokenTensorFileError: if the file has no tensor with this name, or is truncated inside the tensor.
        """
        entry = self._entry(name)
        return self.read_rows(name, 0, matrix_shape(torch.Size(entry.shape))[0]).view(entry.shape)

    def read_rows(self, name: str, top: int, bottom: int) -> Tensor:
        """Returns rows [top, bottom) of a tensor, which is treated as a matrix (`slices.matrix_shape`).

        Raises:
            BrokenTensorFileError: if the file has no tensor with this name, or is truncated inside the rows.
        """
        entry = self._entry(name)
        rows = torch.empty(bottom - top, matrix_shape(torch.Size(entry.shape))[1], dtype=entry.dtype)
        self.read_rows_into(rows, name, top)
        return rows

    def read_rows_into(self, target: Tensor, name: str, top: int) -> None:
        """Fills a matrix with rows of a tensor.

        Args:
            target: contiguous matrix to fill, with the dtype and number of columns of the tensor.
            name: name of the tensor.
            top: index of the first row to read.

        Raises:
            BrokenTensorFileError: if the file has no tensor with this name, or is truncated inside the rows.
        """
        entry, columns = self._entry(name), target.shape[1]
        assert (target.dtype, columns) == (entry.dtype, matrix_shape(torch.Size(entry.shape))[1]), (
            f"{name} does not fit"
        )
        self._read_bytes(self._starts[name] + top * columns * entry.dtype.itemsize, _bytes_of(target))

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise BrokenTensorFileError(f"{self.path} has no tensor {name!r}")
        return self.entries[name]

    def _read_bytes(self, offset: int, target: memoryview) -> None:
        view, done = target, 0
        while done < len(view):
            count = os.preadv(self._descriptor, [view[done:]], offset + done)
            if count == 0:
                raise BrokenTensorFileError(f"{self.path} ends at {offset + done} bytes, inside a tensor")
            done += count
