"""Divides rows into chunks that fit in a CPU's cache, so that several passes over a chunk read it from there."""

# T packed rows, D width.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR

_CHUNK_ELEMENTS = 1 << 17
"""Elements per chunk. PyTorch's own buffers for a chunk add to peak memory, so a larger chunk takes more of it."""


def chunk_rows(x_TD: Tensor) -> int:
    """Returns the rows per chunk, for `Tensor.split`; on a GPU one chunk holds all rows."""
    return max(1, _CHUNK_ELEMENTS // x_TD.shape[1] if x_TD.device.type == "cpu" else len(x_TD))


def accumulate(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Adds one chunk's gradients of parameters to their totals; an empty list of totals means zeros.

    Returns:
        The totals, in float32 for half precision: rounded once at the end, not once per chunk.
    """
    if totals:
        return [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    return [ALLOCATOR.settle(part.to(torch.promote_types(part.dtype, torch.float32)), lasting=True) for part in parts]
