"""Decides whether the row-streaming GPU kernels support given rows, and chooses compile and launch settings for these
kernels.

A row-streaming kernel computes rows one after another, without a matrix product.
"""

# T packed rows, D width.

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from beit3_ds.kernels.ops.self_check import SUPPORTED_DTYPES
from beit3_ds.kernels.triton.architecture import architecture_of, is_on_gpu

if TYPE_CHECKING:
    from beit3_ds.kernels.triton.expert_rows_launch import RowTiling

WIDEST = 8192
"""Maximum columns per row, because one Triton program holds a whole row in registers."""


def row_lengths(stops: Sequence[int]) -> list[int]:
    """Returns the number of rows of each expert: [3, 2] for the stop rows [3, 5]."""
    return [stop - start for start, stop in zip((0, *stops[:-1]), stops, strict=True)]


def fits_kernels(x_TD: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether the row-streaming GPU kernels support these rows.

    The rows must be on a GPU and have at most WIDEST columns. Neither the rows nor the parameters may be float64.

    Args:
        x_TD: rows of the residual stream, in float32 or `dtype`.
        dtype: dtype of the parameters.
    """
    supported = dtype in SUPPORTED_DTYPES and x_TD.dtype in (dtype, torch.float32)
    return is_on_gpu(x_TD) and x_TD.shape[1] <= WIDEST and supported


def row_tiling(x_TD: Tensor) -> "RowTiling":
    """Returns compile and launch settings of the row-streaming kernels for the width and the GPU of `x_TD`."""
    from beit3_ds.kernels.triton.expert_rows_launch import choose_row_tiling  # Triton is needed on a GPU only

    return choose_row_tiling(architecture_of(x_TD.device), x_TD.shape[1])
