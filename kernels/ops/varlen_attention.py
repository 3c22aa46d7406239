"""Computes packed attention with PyTorch's flash attention for sequences of different lengths, without padding.

`packed_attention` uses it on a GPU if it is faster than our kernels (`measured_op`).
"""

# T packed rows, H heads, K head width, Q sequences.

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.device_copy import copy_to_device
from beit3_ds.kernels.ops.attention_plan import Ranges


class VarlenPlan(NamedTuple):
    """Holds the order in which the rows of each sequence follow each other; depends on the sequences' ranges alone."""

    rows: Tensor | None
    """Number of the stream's row at each position of the order, int64; None if the stream has this order already."""
    positions: Tensor | None
    """Position in the order of each of the stream's rows, int64; None if the stream has this order already."""
    bounds: Tensor
    """First position of every sequence, and then the number of all rows, int32."""
    longest: int
    """Number of rows of the longest sequence."""


@lru_cache(maxsize=16)  # the same for all layers that compute all sequences
def plan_varlen(ranges: Ranges, device: torch.device) -> VarlenPlan:
    """Orders the stream's rows sequence by sequence; only pairs of an image and a caption need another order."""
    lengths = [sum(stop - start for start, stop in sequence) for sequence in ranges]
    rows = torch.cat([torch.arange(start, stop) for sequence in ranges for start, stop in sequence])
    bounds = copy_to_device(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), device)
    if bool((rows == torch.arange(len(rows))).all()):
        return VarlenPlan(None, None, bounds, max(lengths))
    positions = rows.argsort()
    return VarlenPlan(copy_to_device(rows, device), copy_to_device(positions, device), bounds, max(lengths))


def varlen_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges) -> Tensor:
    """Computes bidirectional attention within each sequence, as `packed_attention` does.

    Args:
        q_THK: queries, like k_THK and v_THK in half precision on a GPU, with a head size up to 128 that 8 divides.
        ranges: row ranges of each sequence; together they cover [0, T) once.
    """
    from torch.nn.attention.varlen import varlen_attn  # its import needs a build of PyTorch with flash attention

    plan = plan_varlen(ranges, q_THK.device)
    if plan.rows is not None:
        q_THK, k_THK, v_THK = (x_THK.index_select(0, plan.rows) for x_THK in (q_THK, k_THK, v_THK))
    y_THK = varlen_attn(q_THK, k_THK, v_THK, plan.bounds, plan.bounds, plan.longest, plan.longest)
    assert isinstance(y_THK, Tensor)
    return y_THK if plan.positions is None else y_THK.index_select(0, plan.positions)
