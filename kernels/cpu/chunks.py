"""Divides rows into chunks that fit into a CPU's cache, so that several passes over a chunk read from the cache."""

# T packed rows, D width.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR

_CHUNK_ELEMENTS = 1 << 17
"""Elements per chunk. PyTorch allocates buffers of this size, so larger chunks increase peak memory."""


def chunk_rows(x_TD: Tensor) -> int:
    """Returns the number of rows per chunk, for `Tensor.split`. On a GPU, one chunk contains all rows."""
    return max(1, _CHUNK_ELEMENTS // x_TD.shape[1] if x_TD.device.type == "cpu" else len(x_TD))


def accumulate(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Adds the parameter gradients of one chunk (`parts`) in place to the totals of earlier chunks.

    Pass an empty list of totals for the first chunk.

    Returns:
        The totals. Half-precision gradients are added in float32, so they are rounded only once, after the last chunk.
    """
    if totals:
        return [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    return [ALLOCATOR.settle(part.to(torch.promote_types(part.dtype, torch.float32)), lasting=True) for part in parts]
