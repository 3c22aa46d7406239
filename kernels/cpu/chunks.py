"""Divides rows into chunks that fit into a CPU's cache, so that repeated passes over a chunk read from the cache."""

# T packed rows, D width.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR

_CHUNK_ELEMENTS = 1 << 17
"""Elements per chunk. PyTorch allocates buffers per chunk, so larger chunks raise peak memory."""


def chunk_rows(x_TD: Tensor) -> int:
    """Returns the number of rows per chunk, for `Tensor.split`; on a GPU, one chunk holds all rows."""
    return max(1, _CHUNK_ELEMENTS // x_TD.shape[1] if x_TD.device.type == "cpu" else len(x_TD))


def accumulate(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Adds one chunk's parameter gradients (`parts`) to the totals of the earlier chunks, in place.

    For the first chunk, pass an empty list of totals.

    Returns:
        The totals. Half-precision gradients are added in float32, so they are rounded only once, after the last chunk.
    """
    if totals:
        return [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    return [ALLOCATOR.settle(part.to(torch.promote_types(part.dtype, torch.float32)), lasting=True) for part in parts]
