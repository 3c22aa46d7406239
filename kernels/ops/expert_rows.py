"""Rows of a packed stream that belong to experts, and what the kernels that stream them can take."""

# T packed rows, D width.

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

WIDEST = 8192
"""Columns of a row that one program of the kernels holds."""


def row_lengths(stops: Sequence[int]) -> list[int]:
    """How many rows each expert has, from where they end; the first begin at 0."""
    return [stop - start for start, stop in zip((0, *stops[:-1]), stops, strict=True)]


def fits_kernels(x_TD: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether GPU kernels exist for rows of this width and dtype: not for float64, and not beyond WIDEST.

    Args:
        x_TD: rows of the stream, float32 or of `dtype`.
        dtype: dtype of the parameters.
    """
    supported = dtype in (torch.float32, torch.float16, torch.bfloat16) and x_TD.dtype in (dtype, torch.float32)
    return x_TD.is_cuda and x_TD.shape[1] <= WIDEST and supported


def row_tiling(x_TD: Tensor) -> Any:
    """How kernels are compiled for these rows, an `expert_rows_launch.RowTiling`."""
    from beit3_ds.kernels.triton.expert_rows_launch import choose_row_tiling  # only a GPU needs Triton
    from beit3_ds.kernels.triton.packed_attention_launch import architecture_of

    return choose_row_tiling(architecture_of(x_TD.device), x_TD.shape[1])
