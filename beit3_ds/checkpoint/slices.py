"""Defines slices of tensors. A slice is a rectangle of a tensor that is treated as a matrix.

The first dimension of a tensor becomes the rows, and the other dimensions become the columns. A vector becomes one
column. Under tensor parallelism, a rank holds a block of rows or columns. Under ZeRO, a rank owns a range of the
block's elements. This range consists of at most three slices: the end of a row, whole rows, and the beginning of a row.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from beit3_ds.parallel import Split

BLOCK_ELEMENTS = 1 << 20
"""Maximum number of elements (4 MiB of float32) that loading reads at once. If a row in a file is longer, loading reads
the whole row."""


class TensorSlice(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a tensor that is treated as a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the numbers of rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def num_elements(self) -> int:
        """Returns the number of elements in the slice."""
        return (self.bottom - self.top) * (self.right - self.left)

    def blocks(self, max_elements: int) -> Iterator["TensorSlice"]:
        """Divides this slice into slices of at most `max_elements` elements, in row-major order.

        Each result consists of whole rows of this slice, or of a part of one row if a row has more than `max_elements`
        elements.
        """
        width = self.right - self.left
        rows, columns = max(1, max_elements // max(1, width)), max(1, min(width, max_elements))
        for top in range(self.top, self.bottom, rows):
            for left in range(self.left, self.right, columns):
                yield TensorSlice(top, min(top + rows, self.bottom), left, min(left + columns, self.right))

    def intersection(self, other: "TensorSlice") -> "TensorSlice | None":
        """Returns the overlap of this slice and `other`; None if they do not overlap."""
        common = TensorSlice(
            max(self.top, other.top),
            min(self.bottom, other.bottom),
            max(self.left, other.left),
            min(self.right, other.right),
        )
        return common if common.top < common.bottom and common.left < common.right else None

    def inside(self, outer: "TensorSlice") -> tuple[slice, slice]:
        """Returns the row and column indices of this slice relative to `outer`, which must contain this slice."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Returns the numbers of rows and columns of a tensor that is treated as a matrix; (1, 1) for a scalar."""
    rows = shape[0] if shape else 1
    return rows, (shape.numel() // rows if rows else 0)


def whole_slice(shape: torch.Size) -> TensorSlice:
    """Returns the slice that covers a whole tensor."""
    rows, columns = matrix_shape(shape)
    return TensorSlice(0, rows, 0, columns)


def own_block(shape: torch.Size, split: Split | None) -> TensorSlice:
    """Returns the block of a whole tensor that this tensor-parallel rank holds.

    Args:
        shape: shape of the whole tensor.
        split: this rank's part of the tensor, along dimension 0 or 1; None if the rank holds the whole tensor.
    """
    rows, columns = matrix_shape(shape)
    if split is None:
        return TensorSlice(0, rows, 0, columns)
    if split.dim == 0:
        return TensorSlice(split.start, split.stop, 0, columns)
    assert split.dim == 1 and len(shape) == 2, f"{split} does not cut a matrix {tuple(shape)} into blocks"
    return TensorSlice(0, rows, split.start, split.stop)


def slice_range(block: TensorSlice, start: int, stop: int) -> Iterator[tuple[int, TensorSlice]]:
    """Divides a range of elements of a padded block into slices of the tensor.

    A range has up to three slices: the end of a row, whole rows, and the beginning of a row. Padding after the block's
    elements is omitted. It comes from the vocabulary or from ZeRO's partitions.

    Args:
        block: a tensor-parallel rank's block of the tensor.
        start: index of the range's first element, in the row-major order of the block's elements.
        stop: one past the index of the range's last element.

    Yields:
        Pairs (position, slice) in order, where position is the index in the range at which the slice starts.
    """
    width = block.right - block.left
    position, stop = start, min(stop, block.num_elements)
    while position < stop:
        row, column = divmod(position, width)
        top = block.top + row
        if column or stop - position < width:
            length = min(width - column, stop - position)
            part = TensorSlice(top, top + 1, block.left + column, block.left + column + length)
        else:
            part = TensorSlice(top, top + (stop - position) // width, block.left, block.right)
        yield position - start, part
        position += part.num_elements
