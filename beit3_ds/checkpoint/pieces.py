"""Lists the pieces of a checkpoint's tensors in one integer table, and writes, reads and checks the table.

A piece is a slice of a tensor that one rank has written. A checkpoint of 512 ranks has hundreds of thousands of pieces.
The table has a separate file, because reading it as JSON would take seconds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.checkpoint.index import PIECES, PIECES_FILE, BrokenIndexError, Index, index_limit
from beit3_ds.checkpoint.slices import TensorSlice, matrix_shape
from beit3_ds.checkpoint.tensor_file import (
    BrokenTensorFileError,
    TensorEntry,
    TensorFile,
    WrittenFile,
    write_tensor_file,
)

_COLUMNS = 5
_MOST_CORNERS = 2**63 - 1  # numbers of corners are int64
_SHOWN = 80  # maximum characters of a name in a message
_TABLE_FACTOR = 8  # largest size of the table, as a multiple of the largest size of the index

Rows = npt.NDArray[np.int64]


class Piece(NamedTuple):
    """A slice of a tensor, and the rank whose file contains the slice."""

    rank: int
    part: TensorSlice


class PieceTable:
    """Table of the pieces of all tensors, ordered by tensor."""

    def __init__(self, counts: Mapping[str, int], rows: Rows) -> None:
        """Stores the table.

        Args:
            counts: number of pieces of each tensor, by name, in the order of the rows.
            rows: one row per piece, (pieces, 5) int64: rank, top, bottom, left, right (`TensorSlice`).
        """
        self.counts, self.rows = counts, rows

    @cached_property
    def _ranges(self) -> dict[str, slice]:
        stops = list(accumulate(self.counts.values()))
        return dict(zip(self.counts, map(slice, [0, *stops], stops), strict=True))

    @classmethod
    def build(cls, pieces: Iterable[tuple[str, Piece]]) -> "PieceTable":
        """Builds the table from pairs (tensor name, piece) in any order; sorts the tensors by name."""
        lists: dict[str, list[tuple[int, ...]]] = {}
        for name, (rank, part) in pieces:
            lists.setdefault(name, []).append((rank, *part))
        names = sorted(lists)
        rows = np.array([row for name in names for row in lists[name]], dtype=np.int64)
        return cls({name: len(lists[name]) for name in names}, rows.reshape(-1, _COLUMNS))

    @classmethod
    def join(cls, tables: Sequence["PieceTable"]) -> "PieceTable":
        """Joins the tables of all ranks; sorts the tensors by name, and keeps the order of each tensor's pieces."""
        names = sorted({name for table in tables for name in table.counts})
        number_of = {name: number for number, name in enumerate(names)}
        numbers = [number_of[name] for table in tables for name in table.counts]
        of_rows = np.repeat(numbers, [count for table in tables for count in table.counts.values()])
        rows = np.concatenate([table.rows for table in tables])[np.argsort(of_rows, kind="stable")]
        counts = np.bincount(of_rows, minlength=len(names)).tolist()
        return cls(dict(zip(names, counts, strict=True)), rows)

    def rows_of(self, name: str) -> Rows:
        """Returns the table's rows for one tensor, (pieces, 5) int64."""
        return self.rows[self._ranges[name]]

    def overlapping(self, name: str, part: TensorSlice) -> Iterator[Piece]:
        """Yields the pieces of a tensor that share elements with the slice `part`."""
        rows = self.rows_of(name)
        _, top, bottom, left, right = rows.T
        found = (top < part.bottom) & (bottom > part.top) & (left < part.right) & (right > part.left)
        for rank, *bounds in rows[found].tolist():
            yield Piece(rank, TensorSlice(*bounds))


def check_cover(shapes: Mapping[str, torch.Size], pieces: PieceTable) -> None:
    """Checks that the pieces of each tensor cover each element exactly once, and lie inside the tensor.

    Args:
        shapes: shape of each tensor, by name.
        pieces: table of the pieces.

    Raises:
        BrokenIndexError: if pieces overlap, leave gaps or exceed their tensor; the message names the tensor.
    """
    for name, shape in shapes.items():
        if not _cover_once(pieces.rows_of(name), *matrix_shape(shape)):
            raise BrokenIndexError(f"the pieces of {name[:_SHOWN]} do not cover it once")


def _cover_once(rows: Rows, height: int, width: int) -> bool:
    """Returns whether slices lie inside a matrix and cover each element exactly once.

    Tests two conditions on the rectangles, which are the slices and the matrix itself. First, the slices must have as
    many elements in total as the matrix. Second, each point must be a corner of an even number of rectangles.

    Of the four corners of a rectangle, an odd number lies above and to the left of an element if, and only if, the
    rectangle contains the element. So by the second condition, each element lies in an even number of rectangles. The
    matrix is one of the rectangles, so at least one slice covers each of its elements. By the first condition, no
    element is covered twice.

    Args:
        rows: one row per slice, (slices, 5): rank, top, bottom, left, right.
        height: number of rows of the matrix.
        width: number of columns of the matrix.
    """
    if (height + 1) * (width + 1) > _MOST_CORNERS:
        return False
    _, top, bottom, left, right = rows.T
    inside = (rows >= 0).all() and (bottom <= height).all() and (right <= width).all()
    if not inside or (top >= bottom).any() or (left >= right).any():
        return False
    if sum(((bottom - top) * (right - left)).tolist()) != height * width:  # Python integers never overflow
        return False
    corners = [y * (width + 1) + x for y in (top, bottom) for x in (left, right)]
    corners.append(np.array([y * (width + 1) + x for y in (0, height) for x in (0, width)]))
    _, counts = np.unique(np.concatenate(corners), return_counts=True)
    return not (counts % 2).any()


def write_pieces(folder: Path, pieces: PieceTable) -> WrittenFile:
    """Writes the table to a checkpoint's folder and syncs the file.

    Raises:
        OSError: if the disk is full or cannot be written.
    """
    entry = TensorEntry(PIECES, torch.int64, pieces.rows.shape)
    return write_tensor_file(folder / PIECES_FILE, [entry], lambda name: [torch.from_numpy(pieces.rows)], {})


def read_pieces(folder: Path, index: Index) -> PieceTable:
    """Reads a checkpoint's table of pieces, and verifies that the pieces cover each tensor exactly once.

    The table has its own file, whose digest is verified first. In a checkpoint of format 1, the index contains the
    pieces instead.

    Raises:
        BrokenIndexError: if the table's file is missing, unreadable or changed, if the table is invalid, or if the
            pieces do not cover each tensor exactly once. The message describes the fault briefly.
    """
    rows = _read_rows(folder, index) if index.old_pieces is None else _parse_rows(index.old_pieces)
    table = PieceTable(index.num_pieces, rows)
    check_cover(index.shapes, table)
    return table


def _read_rows(folder: Path, index: Index) -> Rows:
    if PIECES_FILE not in index.files:
        raise BrokenIndexError(f"the index does not list {PIECES_FILE}")
    num_bytes, digest = index.files[PIECES_FILE]
    if num_bytes > _TABLE_FACTOR * index_limit(folder):
        raise BrokenIndexError(f"{PIECES_FILE} has {num_bytes} bytes, more than pieces take")
    path = folder / PIECES_FILE
    try:
        if file_sha256(path) != digest:
            raise BrokenIndexError(f"{PIECES_FILE} was changed: its digest is another")
        file = TensorFile(path)
        try:
            entry = TensorEntry(PIECES, torch.int64, (sum(index.num_pieces.values()), _COLUMNS))
            if list(file.entries.values()) != [entry]:
                raise BrokenIndexError(f"{PIECES_FILE} does not hold {entry.shape[0]} pieces")
            return file.read(PIECES).numpy()
        finally:
            file.close()
    except (OSError, BrokenTensorFileError) as error:
        raise BrokenIndexError(f"{PIECES_FILE} cannot be read: {error}") from None


def _parse_rows(pieces: Mapping[str, Sequence[Any]]) -> Rows:
    """Converts the pieces in an index of format 1 to an array with one row per piece.

    In the index, each piece is a list of rank, top, bottom, left and right.
    """
    rows = list(chain.from_iterable(pieces.values()))
    if {type(row) for row in rows} - {list} or {len(row) for row in rows} - {_COLUMNS}:
        raise BrokenIndexError(f"a piece is not a list of {_COLUMNS} values")
    if {type(value) for value in chain.from_iterable(rows)} - {int}:
        raise BrokenIndexError("a piece has values that are not integers")
    return np.array(rows, dtype=np.int64).reshape(-1, _COLUMNS)
