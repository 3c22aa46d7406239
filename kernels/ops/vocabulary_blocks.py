"""How the cross entropy divides a vocabulary into blocks, and which blocks' logits stay for the backward pass."""

# M rows, V vocabulary, N columns of a block, K buffers.

from typing import NamedTuple

CPU_WIDTH = 1024
"""Columns of a block on a CPU: whole rows of logits take up to twice as long to multiply (BENCHMARKS.md)."""

ALIGNMENT = 64
"""On a GPU rows of a block lie a multiple of this apart, so that kernels take 128 bits at a time."""


class VocabularyBlocks(NamedTuple):
    """A division of the vocabulary. Each block's logits are made in a buffer of M x `stride` elements."""

    columns: list[slice]
    """Of every block; the last may have fewer."""
    stride: int
    """Elements between rows of a buffer."""
    num_buffers: int
    """K: the first K - 1 keep a block each, all other blocks go through the last."""

    def buffer(self, index: int) -> int:
        """The buffer that a block's logits are made in."""
        return min(index, self.num_buffers - 1)

    def is_kept(self, index: int) -> bool:
        """Whether a block's logits are still there when all blocks' have been made, in order."""
        return index < self.num_buffers - 1 or index == len(self.columns) - 1


def divide_for_cpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyBlocks:
    """Narrow blocks, of which as many are kept as fit beside one that the backward pass works in.

    Rows are not divided: then the matrix would be read, and its gradient read and written, once for every few rows.

    Args:
        num_rows: M.
        vocabulary: V.
        chunk_size: at most this times V logits exist at a time; None keeps all, beside one block to work in.
    """
    room = _room(num_rows, vocabulary, chunk_size)
    width = min(CPU_WIDTH, vocabulary if chunk_size is None else max(1, room // 2))
    columns = _columns(vocabulary, width)
    num_buffers = len(columns) if chunk_size is None else min(len(columns), max(1, room // width - 1))
    return VocabularyBlocks(columns, width, num_buffers)


def divide_for_gpu(num_rows: int, vocabulary: int, chunk_size: int | None) -> VocabularyBlocks:
    """Blocks as wide as there is room for, all in one buffer, in which gradients are written over logits.

    Arguments as in `divide_for_cpu`; rows are padded to a multiple of ALIGNMENT.
    """
    room = _room(num_rows, vocabulary, chunk_size)
    width = room if room in range(ALIGNMENT) or room == vocabulary else room // ALIGNMENT * ALIGNMENT
    return VocabularyBlocks(_columns(vocabulary, width), -(-width // ALIGNMENT) * ALIGNMENT, 1)


def _room(num_rows: int, vocabulary: int, chunk_size: int | None) -> int:
    """Columns of which all rows' logits may exist at a time."""
    return vocabulary if chunk_size is None else max(1, min(vocabulary, chunk_size * vocabulary // max(1, num_rows)))


def _columns(vocabulary: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]
