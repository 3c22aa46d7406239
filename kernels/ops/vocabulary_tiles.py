"""Divides a vocabulary into tiles for the cross entropy, and selects the tiles whose logits are saved."""

# M rows, V vocabulary, N columns of a tile, K buffers.

from typing import NamedTuple

CPU_WIDTH = 1024
"""Columns per tile on a CPU. Without tiles the matrix products take up to twice as long (BENCHMARKS.md)."""

ALIGNMENT = 64
"""Divisor of a tile's row stride on a GPU, in elements, so that every access of a kernel is 128 bits wide."""


class VocabularyTiles(NamedTuple):
    """Divides the vocabulary's columns into tiles, and says which buffer holds the logits of each tile.

    A buffer has M x `stride` elements for M rows of logits.
    """

    columns: list[slice]
    """Vocabulary columns of every tile; the last tile may be narrower."""
    stride: int
    """Number of elements from the start of one row of a buffer to the next."""
    num_buffers: int
    """Number of buffers, K. Each of the first K - 1 buffers keeps one tile; all other tiles share the last buffer in
    turn."""

    def buffer(self, index: int) -> int:
        """Returns the number of the buffer that holds the logits of tile `index`."""
        return min(index, self.num_buffers - 1)

    def is_kept(self, index: int) -> bool:
        """Returns whether the logits of tile `index` are still in its buffer after all tiles were computed in order."""
        return index < self.num_buffers - 1 or index == len(self.columns) - 1


def divide_for_cpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into narrow tiles, and keeps the logits of tiles until the chunk size is reached.

    Leaves room for one more tile, in which the backward pass works. Rows are not divided, because each group of rows
    would have to read the matrix, and to read and write its gradient.

    Args:
        num_rows: number of rows, M.
        vocabulary: number of columns, V.
        chunk_size: at most `chunk_size` x V logits exist at a time; None keeps all logits, plus one tile to work in.
    """
    max_columns = _max_columns(num_rows, vocabulary, chunk_size)
    width = min(CPU_WIDTH, vocabulary if chunk_size is None else max(1, max_columns // 2))
    columns = _columns(vocabulary, width)
    num_buffers = len(columns) if chunk_size is None else min(len(columns), max(1, max_columns // width - 1))
    return VocabularyTiles(columns, width, num_buffers)


def divide_for_gpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into the widest tiles that fit; all tiles share one buffer.

    In the backward pass, gradients overwrite the logits in the buffer. Its rows are padded to a multiple of ALIGNMENT.

    Args:
        num_rows: number of rows, M.
        vocabulary: number of columns, V.
        chunk_size: at most `chunk_size` x V logits exist at a time; None keeps all logits.
    """
    width = _max_columns(num_rows, vocabulary, chunk_size)
    if width >= ALIGNMENT and width != vocabulary:
        width = width // ALIGNMENT * ALIGNMENT
    return VocabularyTiles(_columns(vocabulary, width), -(-width // ALIGNMENT) * ALIGNMENT, 1)


def _max_columns(num_rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Returns the maximum number of columns whose logits, for all rows, may be in memory at a time."""
    return vocabulary if chunk_size is None else max(1, min(vocabulary, chunk_size * vocabulary // max(1, num_rows)))


def _columns(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
