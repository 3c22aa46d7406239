"""Rows of a stream a piece at a time, on a CPU: what several passes make of a piece stays in cache between them."""

# T packed rows, D width.

from collections.abc import Sequence

import torch
from torch import Tensor

from beit3_ds.kernels.cpu.host_memory import settle

_PIECE = 1 << 17
"""Elements. What PyTorch allocates for a piece comes beside all else, so a larger one takes more memory."""


def piece_length(x_TD: Tensor) -> int:
    """How many rows a piece has, for `Tensor.split`; elsewhere than on a CPU all rows are one."""
    return max(1, _PIECE // x_TD.shape[1] if x_TD.device.type == "cpu" else len(x_TD))


def add_parts(totals: list[Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """Adds to every total a part of the same gradient of a parameter; no totals are zeros.

    Returns:
        The totals, in float32 for half precision, so that no piece's sum is rounded to it.
    """
    if totals:
        return [total.add_(part) for total, part in zip(totals, parts, strict=True)]
    return [settle(part.to(torch.promote_types(part.dtype, torch.float32)), lasting=True) for part in parts]
