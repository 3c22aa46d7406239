"""Decides whether the row-streaming GPU kernels can process rows of a packed stream, and chooses their tiling."""

# T packed rows, D width.

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beit3_ds.kernels.ops.self_check import SUPPORTED_DTYPES

if TYPE_CHECKING:
    from beit3_ds.kernels.triton.expert_rows_launch import RowTiling

WIDEST = 8192
"""Maximum columns of a row, because one program holds the whole row in registers."""


def row_lengths(stops: Sequence[int]) -> list[int]:
    """Returns the number of rows of each expert, given the end of each expert's rows; the first starts at row 0."""
    return [stop - start for start, stop in zip((0, *stops[:-1]), stops, strict=True)]


def fits_kernels(x_TD: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the GPU kernels support these rows: any dtype but float64, and at most WIDEST columns.

    Args:
        x_TD: rows of the stream, float32 or of `dtype`.
        dtype: dtype of the parameters.
    """
    supported = dtype in SUPPORTED_DTYPES and x_TD.dtype in (dtype, torch.float32)
    return x_TD.is_cuda and x_TD.shape[1] <= WIDEST and supported


def row_tiling(x_TD: Tensor) -> "RowTiling":
    """Returns the tiling of the kernels for these rows."""
    from beit3_ds.kernels.triton.architecture import architecture_of
    from beit3_ds.kernels.triton.expert_rows_launch import choose_row_tiling  # Triton is needed on a GPU only

    return choose_row_tiling(architecture_of(x_TD.device), x_TD.shape[1])
