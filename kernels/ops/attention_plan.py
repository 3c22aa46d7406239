"""Plans how attention processes the sequences of a micro-batch: in padded buckets or in tiles.

PyTorch's attention processes buckets of sequences with similar lengths. This project's GPU kernels process tiles, which
are parts of one sequence.
"""

# T packed rows, Q sequences, N tiles; a bucket holds n sequences of at most S rows.

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.device_copy import copy_to_device

Ranges = tuple[tuple[tuple[int, int], ...], ...]
"""Ranges [start, stop) of the packed rows of each sequence. A sequence has one or two ranges. For example, (((0,
197),), ((197, 394), (591, 612))) describes two sequences: one with a single range, and one with two ranges."""

PADDING_ALLOWANCE = 1.5
"""Default for the maximum ratio of the longest to the shortest sequence in a bucket (BENCHMARKS.md)."""

CPU_ROWS = 256
"""Maximum rows of a bucket with several sequences on a CPU. Larger buckets are not faster, and increase peak memory
(BENCHMARKS.md)."""


class Bucket(NamedTuple):
    """Describes n sequences of similar length that one call of scaled_dot_product_attention processes.

    Each sequence is padded to S rows, the length of the longest sequence in the bucket.
    """

    rows: Tensor
    """Indices of the packed rows, (n * S,) int64: first all rows of the first sequence, then of the second, and so on.
    Padding repeats the first row of a sequence."""
    num_sequences: int
    """Number of sequences n in the bucket."""
    first_row: int | None
    """First index in `rows` if the indices are consecutive, so that a view of the packed rows suffices; otherwise None.
    """
    real: Tensor | None
    """Indices at which `rows` has no padding, ascending, int64; None if there is no padding."""
    key_mask: Tensor | None
    """Attention mask, bool, True where a query sees a key; None if all entries are True. Without causal captions, the
    shape is (n, 1, 1, S), and the mask hides padding. With causal captions, the shape is (n, 1, S, S), and the mask
    also hides keys that a query must not see."""


class AttentionPlan(NamedTuple):
    """Holds the buckets of one micro-batch.

    A bucket is a group of sequences with similar lengths. A plan depends on the row ranges of the sequences and on
    whether captions are causal, but not on the values in the rows.
    """

    buckets: tuple[Bucket, ...]
    """The buckets. Each sequence of the micro-batch is in exactly one bucket, except sequences of length 0, which are
    in none."""
    output_rows: Tensor | None
    """For each of the T packed rows, the index of its output in the concatenated outputs of all buckets, (T,) int64.
    None if these outputs are already in the order of the packed rows."""


class TilePlan(NamedTuple):
    """Holds a table of sequences and a table of tiles for attention kernels."""

    sequences_Q4: Tensor
    """Four numbers per sequence, (Q, 4) int32: first row and length of its first range, then first row and length of
    its second range. The second length is 0 if the sequence has only one range."""
    tiles_N2: Tensor
    """Two numbers per tile, (N, 2) int32: the index of the tile's sequence, and the position in that sequence where the
    tile starts. Tiles of longer sequences come first."""


@lru_cache(maxsize=16)  # the same for all layers that compute all sequences
def plan_tiles(ranges: Ranges, tile_size: int, device: torch.device) -> TilePlan:
    """Divides each sequence into tiles of at most `tile_size` rows, and returns tables on `device`."""
    sequences = [[(start, stop - start) for start, stop in (*sequence, (0, 0))[:2]] for sequence in ranges]
    assert all(len(sequence) in (1, 2) for sequence in ranges), "packed_attention: a sequence is one or two ranges"
    order = sorted(range(len(ranges)), key=lambda i: -_length(ranges[i]))
    tiles = [(index, first) for index in order for first in range(0, _length(ranges[index]), tile_size)]
    sequences_Q4 = torch.tensor(sequences, dtype=torch.int32).view(-1, 4)
    tiles_N2 = torch.tensor(tiles, dtype=torch.int32).view(-1, 2)
    return TilePlan(copy_to_device(sequences_Q4, device), copy_to_device(tiles_N2, device))


@lru_cache(maxsize=16)
def plan_attention(
    ranges: Ranges, device: torch.device, causal_captions: bool = False, allowance: float = PADDING_ALLOWANCE
) -> AttentionPlan:
    """Groups sequences of similar length into buckets.

    Adjacent sequences of equal length, such as images, form their own bucket without padding. In other buckets, each
    sequence is padded to the length of the longest one. On a CPU, a bucket with several sequences has at most
    `CPU_ROWS` rows.

    Args:
        ranges: row ranges of each sequence.
        device: device for the tensors of the plan.
        causal_captions: whether captions have a causal mask (see `packed_attention`).
        allowance: maximum ratio of the longest to the shortest sequence in a bucket; 1 means no padding.
    """
    most_rows = CPU_ROWS if device.type == "cpu" else None
    return build_plan(ranges, bucket_by_length(ranges, allowance, most_rows), device, causal_captions)


def bucket_by_length(ranges: Ranges, allowance: float, most_rows: int | None) -> list[list[int]]:
    """Groups sequences of similar length; returns the indices of the sequences in each group.

    Adjacent sequences of equal length, such as images, form their own group, because a view of the packed rows can
    batch them. A sequence of length 0 is in no group.

    Args:
        ranges: row ranges of each sequence.
        allowance: maximum ratio of the longest to the shortest sequence in a group.
        most_rows: maximum rows of a group with several sequences, including padding; None for no limit.
    """
    groups = _group_by_length(ranges, allowance)
    if most_rows is None:
        return groups
    cut: list[list[int]] = []
    for group in groups:
        size = max(1, most_rows // max(_length(ranges[index]) for index in group))
        cut += [group[first : first + size] for first in range(0, len(group), size)]
    return cut


def _group_by_length(ranges: Ranges, allowance: float) -> list[list[int]]:
    lengths = [_length(sequence) for sequence in ranges]
    groups = _consecutive_equals(ranges)
    apart, first = {index for group in groups for index in group}, len(groups)
    for index in sorted((i for i, length in enumerate(lengths) if length and i not in apart), key=lengths.__getitem__):
        if len(groups) > first and lengths[index] <= allowance * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def _consecutive_equals(ranges: Ranges) -> list[list[int]]:
    """Finds sequences of equal length whose packed rows are adjacent; returns the sequence indices of each group.

    Each group has at least two sequences. A sequence with two ranges is in no group.
    """
    runs: list[list[int]] = []
    for index, sequence in enumerate(ranges):
        if len(sequence) != 1 or not _length(sequence):
            continue
        before = ranges[runs[-1][-1]][0] if runs else (0, 0)
        if before[1] == sequence[0][0] and before[1] - before[0] == _length(sequence):
            runs[-1].append(index)
        else:
            runs.append([index])
    return [run for run in runs if len(run) > 1]


def build_plan(
    ranges: Ranges, groups: list[list[int]], device: torch.device, causal_captions: bool = False
) -> AttentionPlan:
    """Builds a plan with one bucket per group. A group lists indices of sequences."""
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
        seen = real[:, None, None, :]
        if causal_captions and any(len(ranges[index]) == 2 for index in group):
            visible = [captioning_mask(longest, image_rows(ranges[index]), real.device) for index in group]
            seen = seen & torch.stack(visible)[:, None]
        mask = None if bool(seen.all()) else copy_to_device(seen, device)
        kept = None if bool(real.all()) else copy_to_device(real.flatten().nonzero().squeeze(1), device)
        first_row = int(flat[0]) if consecutive else None
        buckets.append(Bucket(copy_to_device(flat, device), len(group), first_row, kept, mask))
    row, position = torch.cat(order, dim=1) if order else torch.empty(2, 0, dtype=torch.int64)
    output_rows = torch.empty_like(position)
    output_rows[row] = position
    in_order = bool((output_rows == torch.arange(len(output_rows))).all())
    return AttentionPlan(tuple(buckets), None if in_order else copy_to_device(output_rows, device))


def _length(sequence: tuple[tuple[int, int], ...]) -> int:
    return sum(stop - start for start, stop in sequence)


def image_rows(sequence: tuple[tuple[int, int], ...]) -> int:
    """Returns the number of rows in a sequence's first range, which is the image of an image-caption pair.

    Under the captioning mask, all rows of the sequence see the first range.
    """
    return _length(sequence[:1])


def captioning_mask(length: int, image_length: int, device: torch.device) -> Tensor:
    """Returns the captioning mask of one sequence, (length, length) bool. An entry is True if a query sees a key.

    Rows of the mask are queries, and columns are keys. Every query sees the first `image_length` keys. A query behind
    the image also sees all keys up to its own position.
    """
    positions = torch.arange(length, device=device)
    return positions < (positions + 1).clamp(min=image_length).unsqueeze(1)
