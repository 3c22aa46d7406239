"""Divides a vocabulary into tiles for the cross entropy, and selects the tiles whose logits are saved."""

# M rows, V vocabulary, N columns of a tile, K buffers.

from typing import NamedTuple

CPU_WIDTH = 1024
"""Columns per tile on a CPU. Without tiles, the matrix products take up to twice as long (BENCHMARKS.md)."""

ALIGNMENT = 64
"""Alignment of a tile's row stride on a GPU in elements, so that kernels access 128 bits at a time."""


class VocabularyTiles(NamedTuple):
    """Divides the vocabulary's columns into tiles, and assigns the logits of each tile to a buffer.

    A buffer has M x `stride` elements for M rows of logits.
    """

    columns: list[slice]
    """Vocabulary columns of each tile; the last tile may be narrower than the others."""
    stride: int
    """Number of elements from the start of one buffer row to the start of the next."""
    num_buffers: int
    """Number of buffers K. The first K - 1 buffers keep one tile each; all other tiles share the last."""

    def buffer(self, index: int) -> int:
        """Returns the number of the buffer for the logits of tile `index`."""
        return min(index, self.num_buffers - 1)

    def is_kept(self, index: int) -> bool:
        """Returns whether a buffer still holds the logits of tile `index` after all tiles were computed in order."""
        return index < self.num_buffers - 1 or index == len(self.columns) - 1


def divide_for_cpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into narrow tiles, and keeps the logits of as many tiles as the chunk size allows.

    Space for one tile is left free, because the backward pass needs it. Rows are not divided: each group of rows would
    have to read the whole matrix, and to read and write the matrix's gradient.

    Args:
        num_rows: number of rows M.
        vocabulary: number of columns V.
        chunk_size: at most `chunk_size` x V logits exist at once. None keeps all logits, plus one tile to work in.
    """
    max_columns = _max_columns(num_rows, vocabulary, chunk_size)
    width = min(CPU_WIDTH, vocabulary if chunk_size is None else max(1, max_columns // 2))
    columns = _columns(vocabulary, width)
    num_buffers = len(columns) if chunk_size is None else min(len(columns), max(1, max_columns // width - 1))
    return VocabularyTiles(columns, width, num_buffers)


def divide_for_gpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into the widest tiles that the chunk size allows; all tiles share one buffer.

    In the backward pass, gradients overwrite the logits in the buffer. The buffer's rows are padded to a multiple of
    ALIGNMENT.

    Args:
        num_rows: number of rows M.
        vocabulary: number of columns V.
        chunk_size: at most `chunk_size` x V logits exist at once. None keeps all logits.
    """
    width = _max_columns(num_rows, vocabulary, chunk_size)
    if width >= ALIGNMENT and width != vocabulary:
        width = width // ALIGNMENT * ALIGNMENT
    return VocabularyTiles(_columns(vocabulary, width), -(-width // ALIGNMENT) * ALIGNMENT, 1)


def _max_columns(num_rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Returns the maximum number of columns whose logits, for all rows, may exist at once."""
    return vocabulary if chunk_size is None else max(1, min(vocabulary, chunk_size * vocabulary // max(1, num_rows)))


def _columns(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
