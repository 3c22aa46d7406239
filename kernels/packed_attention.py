"""Bidirectional attention inside each sequence of a packed stream, a sequence being one or two row ranges."""

# T packed rows, H heads, K head width; a bucket holds n sequences of at most S rows.

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Ranges = tuple[tuple[tuple[int, int], ...], ...]
"""The row ranges [start, stop) of each sequence, e.g. (((0, 197),), ((197, 394), (591, 612)))."""

PADDING_ALLOWANCE = 1.5
"""Sequences share a padded bucket while the longest is at most this much longer than the shortest (BENCHMARKS.md)."""


class Bucket(NamedTuple):
    """Sequences that one call of scaled_dot_product_attention handles."""

    rows: Tensor
    """Rows of the stream, (n * S,) int64, sequence by sequence; padding repeats a row of the same sequence."""
    num_sequences: int
    """n."""
    first_row: int | None
    """Set if the rows are first_row, first_row + 1, ...: a view serves and nothing is gathered."""
    key_mask: Tensor | None
    """True where a key is real, (n, 1, 1, S) bool; None if nothing is padded."""


class AttentionPlan(NamedTuple):
    """How a micro-batch's sequences are batched; a pure function of their ranges."""

    buckets: tuple[Bucket, ...]
    """Every sequence stands in one bucket."""
    output_rows: Tensor | None
    """Where row t of the stream stands in the buckets' concatenated outputs, (T,) int64; None if they are in order."""


def packed_attention_reference(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges) -> Tensor:
    """What `packed_attention` computes: one softmax a sequence, in plain PyTorch."""
    y_THK = torch.zeros_like(q_THK)
    for sequence in ranges:
        rows = torch.cat([torch.arange(start, stop, device=q_THK.device) for start, stop in sequence])
        q_HSK, k_HSK, v_HSK = (x[rows].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        weights_HSS = (q_HSK @ k_HSK.transpose(1, 2) * q_HSK.shape[-1] ** -0.5).softmax(-1)
        y_THK = y_THK.index_copy(0, rows, (weights_HSS @ v_HSK).transpose(0, 1))
    return y_THK


def packed_attention(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges) -> Tensor:
    """Attention of every row to all rows of its own sequence, scaled by 1 / sqrt(K).

    Args:
        q_THK: queries; k_THK and v_THK alike.
        ranges: the row ranges of each sequence; together they cover [0, T) once.

    Returns:
        y_THK, the heads of every row, of q's dtype.
    """
    return attend(q_THK, k_THK, v_THK, plan_attention(ranges, q_THK.device))


@lru_cache(maxsize=16)  # every layer of a micro-batch asks for the same plan
def plan_attention(ranges: Ranges, device: torch.device) -> AttentionPlan:
    """Batches sequences of similar length, those of equal length without padding."""
    return build_plan(ranges, bucket_by_length(ranges, PADDING_ALLOWANCE), device)


def bucket_by_length(ranges: Ranges, allowance: float) -> list[list[int]]:
    """Groups sequences with neighbouring lengths; a group's longest is at most `allowance` times its shortest."""
    lengths = [_length(sequence) for sequence in ranges]
    groups: list[list[int]] = []
    for index in sorted(range(len(ranges)), key=lambda i: (lengths[i], i)):
        if groups and lengths[index] <= allowance * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def build_plan(ranges: Ranges, groups: list[list[int]], device: torch.device) -> AttentionPlan:
    """Turns groups of sequence numbers into row indices and masks."""
    buckets, order = [], []
    offset = 0
    for group in groups:
        rows = [torch.cat([torch.arange(start, stop) for start, stop in ranges[index]]) for index in group]
        longest = max(len(r) for r in rows)
        padded = torch.stack([torch.cat([r, r[:1].expand(longest - len(r))]) for r in rows])
        real = torch.stack([torch.arange(longest) < len(r) for r in rows])
        position = offset + torch.arange(real.numel()).view_as(real)
        order.append(torch.stack([padded[real], position[real]]))
        offset += real.numel()
        flat = padded.flatten()
        consecutive = bool(real.all()) and bool((flat == flat[0] + torch.arange(len(flat))).all())
        mask = None if bool(real.all()) else real[:, None, None, :].to(device)
        buckets.append(Bucket(flat.to(device), len(group), int(flat[0]) if consecutive else None, mask))
    row, position = torch.cat(order, dim=1) if order else torch.empty(2, 0, dtype=torch.int64)
    output_rows = torch.empty_like(position)
    output_rows[row] = position
    in_order = bool((output_rows == torch.arange(len(output_rows))).all())
    return AttentionPlan(tuple(buckets), None if in_order else output_rows.to(device))


def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """Runs one scaled_dot_product_attention a bucket and puts the outputs back in row order."""
    outputs = [_attend_bucket(q_THK, k_THK, v_THK, bucket) for bucket in plan.buckets]
    if not outputs:
        return q_THK + k_THK + v_THK  # no rows: nothing to attend, but every projection stays in the graph
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y if plan.output_rows is None else y.index_select(0, plan.output_rows)


def _attend_bucket(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, bucket: Bucket) -> Tensor:
    take = _row_reader(bucket)
    y_nHSK = F.scaled_dot_product_attention(take(q_THK), take(k_THK), take(v_THK), attn_mask=bucket.key_mask)
    return y_nHSK.transpose(1, 2).flatten(0, 1)


def _row_reader(bucket: Bucket) -> Callable[[Tensor], Tensor]:
    def take(x_THK: Tensor) -> Tensor:
        if bucket.first_row is None:
            rows = x_THK.index_select(0, bucket.rows)
        else:
            rows = x_THK[bucket.first_row : bucket.first_row + len(bucket.rows)]
        return rows.unflatten(0, (bucket.num_sequences, -1)).transpose(1, 2)

    return take


def _length(sequence: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in sequence)
