"""Safetensors files written and read piece by piece, so that no file has to fit in memory.

The library's writer takes all tensors at once and gives no digest. Its reader maps files into memory: what was read
counts as the process's memory, and a file that is cut or lost meanwhile kills the process instead of raising an error.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.disk import NewFile
from beit3_ds.checkpoint.rectangles import matrix_shape

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
_LARGEST_HEADER = 1 << 30  # bytes; a length beyond it is no header's


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
    path: Path,
    entries: Sequence[TensorEntry],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    *,
    with_digest: bool = True,
) -> WrittenFile:
    """Writes a new safetensors file and syncs it.

    Args:
        path: must not exist.
        entries: what the file will hold, in this order.
        read: gives the tensor of a name; called once for each, one after the other, and nothing is kept of it.
        metadata: strings for the file's header.
        with_digest: whether to compute one; without, that of the result is empty.

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
    with NewFile(path, with_digest=with_digest) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, shape in entries:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, tuple(shape)), f"{name} is not what was announced"
            file.write(_bytes_of(tensor.cpu().contiguous()))
    return WrittenFile(file.num_bytes, file.sha256)


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.detach().view(-1).view(torch.uint8).numpy().data)


class BrokenTensorFileError(ValueError):
    """A file that is not a safetensors file, or is cut, or lacks a tensor."""


class TensorFile:
    """A safetensors file of which parts are read as they are asked for."""

    def __init__(self, path: Path) -> None:
        """Opens the file and reads its header.

        Raises:
            BrokenTensorFileError: with what is wrong.
            OSError: if it cannot be read.
        """
        self.path = path
        self._file = open(path, "rb")  # noqa: SIM115 - closed by `close`
        try:
            length = int.from_bytes(self._read_bytes(0, bytearray(8)), "little")
            if length > _LARGEST_HEADER:
                raise ValueError
            header = json.loads(bytes(self._read_bytes(8, bytearray(length))))
            self.metadata: dict[str, str] = header.pop("__metadata__", {})
            self._data, names = 8 + length, {written: dtype for dtype, written in _DTYPES.items()}
            self._places = {name: entry["data_offsets"] for name, entry in header.items()}
            self.entries = {
                name: TensorEntry(name, names[entry["dtype"]], tuple(entry["shape"])) for name, entry in header.items()
            }
            """What the file holds, by name."""
            for name, entry in self.entries.items():
                start, stop = self._places[name]
                if start < 0 or stop - start != torch.Size(entry.shape).numel() * entry.dtype.itemsize:
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError):
            self._file.close()
            raise BrokenTensorFileError(f"{path} is not a whole safetensors file") from None

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            BrokenTensorFileError: if the file has none of that name, or ends before it does.
        """
        entry = self._entry(name)
        return self.read_rows(name, 0, matrix_shape(torch.Size(entry.shape))[0]).view(entry.shape)

    def read_rows(self, name: str, top: int, bottom: int) -> Tensor:
        """Rows [top, bottom) of a tensor seen as a matrix (`rectangles.matrix_shape`).

        Raises:
            BrokenTensorFileError: as `read`.
        """
        entry = self._entry(name)
        rows = torch.empty(bottom - top, matrix_shape(torch.Size(entry.shape))[1], dtype=entry.dtype)
        self.read_rows_into(rows, name, top)
        return rows

    def read_rows_into(self, target: Tensor, name: str, top: int) -> None:
        """Overwrites a matrix with as many rows of a tensor as it has, from row `top` on.

        Args:
            target: contiguous, with the tensor's type and columns.
            name: of the tensor.
            top: the first row.

        Raises:
            BrokenTensorFileError: as `read`.
        """
        entry, columns = self._entry(name), target.shape[1]
        assert (target.dtype, columns) == (entry.dtype, matrix_shape(torch.Size(entry.shape))[1]), (
            f"{name} does not fit"
        )
        self._read_bytes(self._data + self._places[name][0] + top * columns * entry.dtype.itemsize, _bytes_of(target))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.entries:
            raise BrokenTensorFileError(f"{self.path} has no tensor {name!r}")
        return self.entries[name]

    def _read_bytes(self, offset: int, target: bytearray | memoryview) -> bytearray | memoryview:
        view, done = memoryview(target), 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise BrokenTensorFileError(f"{self.path} ends at {offset + done} bytes, inside a tensor")
            done += count
        return target
