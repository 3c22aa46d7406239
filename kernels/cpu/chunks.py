"""Divides rows into chunks that fit into a CPU's cache, and adds up the chunks' parameter gradients."""

# T packed rows, D width.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR

_CHUNK_ELEMENTS = 1 << 17
"""Maximum elements per chunk. PyTorch allocates buffers of this size, so a larger value increases peak memory."""


def chunk_rows(x_TD: Tensor) -> int:
    """Returns how many rows of `x_TD` form one chunk, for `Tensor.split`. On a GPU, one chunk contains all rows."""
    return max(1, _CHUNK_ELEMENTS // x_TD.shape[1] if x_TD.device.type == "cpu" else len(x_TD))


def accumulate(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Adds the parameter gradients from one chunk of rows to the totals from earlier chunks, in place.

    Args:
        totals: sum of each parameter's gradients over earlier chunks. Pass an empty list for the first chunk.
        parts: gradient of each parameter from this chunk.

    Returns:
        The new totals. Half-precision gradients are summed in float32, so the caller rounds only once, after the last
        chunk.
    """
    if totals:
        return [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    return [ALLOCATOR.settle(part.to(torch.promote_types(part.dtype, torch.float32)), lasting=True) for part in parts]
