"""Computes packed attention with PyTorch's variable-length flash attention, which needs no padding.

On a GPU, `packed_attention` uses this module if it is faster than this project's kernels (`measured_op`).
"""

# T packed rows, H heads, K head width, Q sequences.

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.device_copy import copy_to_device
from beit3_ds.kernels.ops.attention_plan import Ranges


class VarlenPlan(NamedTuple):
    """Describes how to sort packed rows by sequence. A plan depends only on the row ranges of the sequences."""

    rows: Tensor | None
    """For each index in the sorted order, the index of the packed row, (T,) int64; None if the rows are already sorted.
    """
    positions: Tensor | None
    """For each packed row, its index in the sorted order, (T,) int64; None if the rows are already sorted."""
    bounds: Tensor
    """Cumulative sequence lengths in the sorted order (cu_seqlens), int32: 0 first, the total number of rows last."""
    longest: int
    """Number of rows in the longest sequence (max_seqlen)."""


@lru_cache(maxsize=16)  # the same for all layers that compute all sequences
def plan_varlen(ranges: Ranges, device: torch.device) -> VarlenPlan:
    """Plans how to sort packed rows by sequence. Without image-caption pairs, the rows are already sorted."""
    lengths = [sum(stop - start for start, stop in sequence) for sequence in ranges]
    rows = torch.cat([torch.arange(start, stop) for sequence in ranges for start, stop in sequence])
    bounds = copy_to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    if bool((rows == torch.arange(len(rows))).all()):
        return VarlenPlan(None, None, bounds, max(lengths))
    positions = rows.argsort()
    return VarlenPlan(copy_to_device(rows, device), copy_to_device(positions, device), bounds, max(lengths))


def varlen_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges) -> Tensor:
    """Computes bidirectional attention within each sequence; has the same result as `packed_attention`.

    Args:
        q_THK: queries on a GPU in half precision; k_THK and v_THK have the same shape and dtype. The head width K is a
            multiple of 8, and at most 128.
        ranges: one or two row ranges per sequence. Each row is in exactly one range.
    """
    from torch.nn.attention.varlen import varlen_attn  # its import needs a build of PyTorch with flash attention

    plan = plan_varlen(ranges, q_THK.device)
    if plan.rows is not None:
        q_THK, k_THK, v_THK = (x_THK.index_select(0, plan.rows) for x_THK in (q_THK, k_THK, v_THK))
    y_THK = varlen_attn(q_THK, k_THK, v_THK, plan.bounds, plan.bounds, plan.longest, plan.longest)
    assert isinstance(y_THK, Tensor)
    return y_THK if plan.positions is None else y_THK.index_select(0, plan.positions)
