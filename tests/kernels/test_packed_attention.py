"""Packed attention against one softmax a sequence, over ragged sequences of one or two ranges."""

import torch
from beit3_ds.kernels.packed_attention import packed_attention, packed_attention_reference, plan_attention
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


@given(mix=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)), seed=st.integers(0, 100))
@settings(max_examples=40, deadline=None)
def test_equals_reference(mix: tuple[int, int, int], seed: int) -> None:
    batch = random_batch(CONFIG, *mix, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch.num_rows, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    results = []
    for op in (packed_attention, packed_attention_reference):
        y = op(q, k, v, batch.sequence_ranges)
        weighted = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum() + 0 * (q + k + v).sum()
        results.append([y, *torch.autograd.grad(weighted, (q, k, v))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_equal_images_are_a_view() -> None:
    """Images must not be gathered or padded: they are most of the rows."""
    batch = random_batch(CONFIG, 3, 0, 0)
    (bucket,) = plan_attention(batch.sequence_ranges, torch.device("cpu")).buckets
    assert bucket.first_row == 0
    assert bucket.key_mask is None


def test_one_token_sequences() -> None:
    q, k, v = (torch.randn(3, 2, 4) for _ in range(3))
    ranges = (((0, 1),), ((1, 2),), ((2, 3),))
    torch.testing.assert_close(packed_attention(q, k, v, ranges), v)  # a softmax over one key is 1
