"""Which part of a logical tensor a run of a rank's elements is: a few rectangles.

Every tensor is seen as a matrix: its first dimension is the rows, the others together are the columns; a vector is one
column. Ranks hold runs of elements (ZeRO cuts flat memory) of blocks of that matrix (tensor parallelism cuts rows or
columns), and a run of elements of a block is at most three rectangles of the matrix.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from beit3_ds.parallel import Split


class Rectangle(NamedTuple):
    """Rows [top, bottom) and columns [left, right) of a tensor seen as a matrix."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.bottom - self.top, self.right - self.left

    @property
    def num_elements(self) -> int:
        """How many elements it holds."""
        return (self.bottom - self.top) * (self.right - self.left)

    def intersection(self, other: "Rectangle") -> "Rectangle | None":
        """What two rectangles of one matrix share; None if that is nothing."""
        common = Rectangle(
            max(self.top, other.top),
            min(self.bottom, other.bottom),
            max(self.left, other.left),
            min(self.right, other.right),
        )
        return common if common.top < common.bottom and common.left < common.right else None

    def inside(self, outer: "Rectangle") -> tuple[slice, slice]:
        """Where it lies in `outer`, which contains it: the indices of its rows and columns there."""
        rows = slice(self.top - outer.top, self.bottom - outer.top)
        return rows, slice(self.left - outer.left, self.right - outer.left)


def matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """Rows and columns of a tensor seen as a matrix; a scalar is one of each."""
    rows = shape[0] if shape else 1
    return rows, (shape.numel() // rows if rows else 0)


def whole(shape: torch.Size) -> Rectangle:
    """All of a tensor."""
    rows, columns = matrix_shape(shape)
    return Rectangle(0, rows, 0, columns)


def own_block(shape: torch.Size, split: Split | None) -> Rectangle:
    """The block of a logical tensor that tensor parallelism leaves to a rank.

    Args:
        shape: logical.
        split: this rank's part along dimension 0, or along dimension 1 of a matrix; None is all.
    """
    rows, columns = matrix_shape(shape)
    if split is None:
        return Rectangle(0, rows, 0, columns)
    if split.dim == 0:
        return Rectangle(split.start, split.stop, 0, columns)
    assert split.dim == 1 and len(shape) == 2, f"{split} does not cut a matrix {tuple(shape)} into blocks"
    return Rectangle(0, rows, split.start, split.stop)


def run_of(block: Rectangle, start: int, stop: int) -> Iterator[tuple[int, Rectangle]]:
    """The rectangles that elements [start, stop) of a block are, counted row by row.

    What lies behind the block's end (the padding of a vocabulary, or of ZeRO's partitions) is left out.

    Yields:
        The number in the run of each rectangle's first element, and the rectangle: a part of a row, whole rows and a
        part of a row, as far as there are any, in the order of their elements.
    """
    width = block.right - block.left
    position, stop = start, min(stop, block.num_elements)
    while position < stop:
        row, column = divmod(position, width)
        top = block.top + row
        if column or stop - position < width:
            length = min(width - column, stop - position)
            rectangle = Rectangle(top, top + 1, block.left + column, block.left + column + length)
        else:
            rectangle = Rectangle(top, top + (stop - position) // width, block.left, block.right)
        yield position - start, rectangle
        position += rectangle.num_elements
