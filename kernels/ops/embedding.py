"""Looks up embeddings. The table's gradient is a dense tensor, also in a batch without ids."""

# S ids, V rows of the table, D width.

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.differentiation import once_differentiable


def embedding(ids_S: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns the row of a table for each id. If there are no ids, the table's gradient is zero instead of None.

    Args:
        ids_S: row numbers in the table, int64.
        weight_VD: table.

    Returns:
        One row per id, (S, D) in the table's dtype.
    """
    rows_SD: Tensor = _Embedding.apply(ids_S, weight_VD)
    return rows_SD


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids_S: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(ids_S)
        ctx.table_size = len(weight_VD)
        return F.embedding(ids_S, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows_SD: Tensor) -> tuple[None, Tensor]:
        (ids_S,) = ctx.saved_tensors
        if d_rows_SD.is_cuda:  # PyTorch's kernel sorts the ids, so no two threads add to one row
            return None, torch.ops.aten.embedding_dense_backward(d_rows_SD, ids_S, ctx.table_size, -1, False)
        d_weight_VD = ALLOCATOR.empty(d_rows_SD, ctx.table_size, d_rows_SD.shape[1], lasting=True)
        return None, d_weight_VD.zero_().index_add_(0, ids_S, d_rows_SD)
