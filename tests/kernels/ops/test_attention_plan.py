"""Tests how the sequences of a micro-batch are divided into buckets and tiles."""

import torch

from beit3_ds.kernels.ops.attention_plan import bucket_by_length, plan_attention, plan_tiles

RANGES = (((0, 3),), ((3, 5), (7, 9)), ((5, 6), (9, 10)), ((6, 7),), ((10, 10),))


def test_tiles_cover_every_sequence_once() -> None:
    plan = plan_tiles(RANGES, 2, torch.device("cpu"))
    assert plan.sequences_Q4.tolist() == [[0, 3, 0, 0], [3, 2, 7, 2], [5, 1, 9, 1], [6, 1, 0, 0], [10, 0, 0, 0]]
    assert plan.tiles_N2.tolist() == [[1, 0], [1, 2], [0, 0], [0, 2], [2, 0], [3, 0]]


def test_equal_images_are_a_view() -> None:
    """Checks that images are neither gathered nor padded with the slightly longer pairs; most rows are images'."""
    ranges = (((0, 17),), ((17, 34),), ((34, 51), (68, 71)), ((51, 68), (71, 76)))
    images, pairs = plan_attention(ranges, torch.device("cpu")).buckets
    assert images.first_row == 0 and images.num_sequences == 2
    assert images.key_mask is None and images.real is None
    assert pairs.num_sequences == 2


def test_rows_of_a_group_are_limited() -> None:
    ranges = (*(((start, start + 100),) for start in range(0, 500, 100)), ((500, 900),))
    assert bucket_by_length(ranges, 1.5, 256) == [[0, 1], [2, 3], [4], [5]]
    assert bucket_by_length(ranges, 1.5, None) == [[0, 1, 2, 3, 4], [5]]


def test_no_sequence_is_padded_without_an_allowance() -> None:
    """Checks that no sequence is padded if padding is not allowed; PyTorch's flash attention takes no mask."""
    ranges = (((0, 12),), ((12, 24),), ((24, 39),), ((39, 51),))
    assert bucket_by_length(ranges, 1.0, None) == [[0, 1], [3], [2]]
    plan = plan_attention(ranges, torch.device("cpu"), allowance=1.0)
    assert all(bucket.key_mask is None and bucket.real is None for bucket in plan.buckets)
