"""Divides a vocabulary into tiles for the cross entropy, and decides which tiles keep their logits in memory."""

# M rows, V vocabulary, N columns of a tile, K buffers.

from typing import NamedTuple

CPU_WIDTH = 1024
"""Vocabulary columns per tile on a CPU. Without tiles, the matrix products take up to twice as long (BENCHMARKS.md)."""

ALIGNMENT = 64
"""On a GPU, the row stride of a buffer is a multiple of this number of elements, so that kernels can access 128 bits at
a time."""


class VocabularyTiles(NamedTuple):
    """Divides the columns of a vocabulary into tiles, and assigns each tile a buffer for its logits.

    A buffer has M x `stride` elements, for the logits of M rows.
    """

    columns: list[slice]
    """Range of vocabulary columns of each tile; the last tile may be narrower than the others."""
    stride: int
    """Elements from the start of one row of a buffer to the start of the next row."""
    num_buffers: int
    """Number of buffers K. Each of the first K - 1 tiles has its own buffer. All further tiles share the last buffer.
    """

    def buffer(self, index: int) -> int:
        """Returns the index of the buffer for the logits of tile `index`."""
        return min(index, self.num_buffers - 1)

    def is_kept(self, index: int) -> bool:
        """Returns whether the logits of tile `index` are still in a buffer after all tiles have been computed one after
        the other.
        """
        return index < self.num_buffers - 1 or index == len(self.columns) - 1


def divide_for_cpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into narrow tiles, and chooses how many tiles get their own buffer for logits.

    Without a chunk size, every tile gets its own buffer. With a chunk size, the number of buffers is limited. Tiles
    without their own buffer share one buffer. The backward pass needs memory for one more tile. Rows are not divided.
    If rows were divided, every group of rows would read the whole output matrix, and update the matrix's whole
    gradient.

    Args:
        num_rows: number of rows M.
        vocabulary: number of vocabulary columns V.
        chunk_size: limit on memory, or None. The buffers and the backward pass's tile together hold at most
            `chunk_size` x V logits. If this is less than two columns of M logits, they hold two columns.
    """
    max_columns = _max_columns(num_rows, vocabulary, chunk_size)
    width = min(CPU_WIDTH, vocabulary if chunk_size is None else max(1, max_columns // 2))
    columns = _columns(vocabulary, width)
    num_buffers = len(columns) if chunk_size is None else min(len(columns), max(1, max_columns // width - 1))
    return VocabularyTiles(columns, width, num_buffers)


def divide_for_gpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyTiles:
    """Divides a vocabulary into the widest tiles that the chunk size allows. All tiles share one buffer.

    In the backward pass, gradients overwrite the logits in the buffer. Each row of the buffer is padded to a multiple
    of ALIGNMENT elements.

    Args:
        num_rows: number of rows M.
        vocabulary: number of vocabulary columns V.
        chunk_size: limit on memory. A tile, with M logits per column, has at most `chunk_size` x V logits, but always
            at least one column. If None, a single tile has all columns.
    """
    width = _max_columns(num_rows, vocabulary, chunk_size)
    if width >= ALIGNMENT and width != vocabulary:
        width = width // ALIGNMENT * ALIGNMENT
    return VocabularyTiles(_columns(vocabulary, width), -(-width // ALIGNMENT) * ALIGNMENT, 1)


def _max_columns(num_rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Returns the maximum number of vocabulary columns in one tile.

    A tile contains the logits of all rows for some columns. With a chunk size, a tile has at most `chunk_size` x
    `vocabulary` logits, unless it has only one column. Without a chunk size, a tile may have all `vocabulary` columns.
    """
    return vocabulary if chunk_size is None else max(1, min(vocabulary, chunk_size * vocabulary // max(1, num_rows)))


def _columns(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
