"""Tests that the divergence from smoothed labels equals that of full logits, forward and backward."""

import pytest
import torch

from beit3_ds.kernels.ops import vocabulary_tiles
from beit3_ds.kernels.ops.label_smoothing import LabelSmoothing, smoothed_cross_entropy_reference
from beit3_ds.kernels.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from tests.kernels.ops.test_linear_cross_entropy import problem

VOCAB, PADDING = 11, 3


@pytest.mark.parametrize("rows", [0, 1, 9])
@pytest.mark.parametrize("chunk_size", [4, None])
def test_equals_reference(rows: int, chunk_size: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary_tiles, "CPU_WIDTH", 3)
    h, w, b, target = problem(rows, VOCAB)
    padded_w = torch.cat([w.detach(), torch.zeros(PADDING, w.shape[1], dtype=w.dtype)]).requires_grad_()
    padded_b = torch.cat([b.detach(), torch.full((PADDING,), -1e4, dtype=b.dtype)]).requires_grad_()
    smoothing = LabelSmoothing(0.1, VOCAB, VOCAB)
    ours = linear_cross_entropy(h, padded_w, padded_b, target, chunk_size, smoothing=smoothing)
    expected = smoothed_cross_entropy_reference(h, w, b, target, 0.1)
    torch.testing.assert_close(ours, expected)
    upstream = torch.arange(rows, dtype=torch.float64) + 0.5
    dh, dw, db = torch.autograd.grad(ours, (h, padded_w, padded_b), upstream)
    for mine, theirs in zip(
        (dh, dw[:VOCAB], db[:VOCAB]), torch.autograd.grad(expected, (h, w, b), upstream), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert not dw[VOCAB:].any() and not db[VOCAB:].any()  # a padding bias of -1e4 in the sum would be seen above


def test_no_smoothing_is_the_cross_entropy() -> None:
    *leaves, target = problem(5)
    ours = smoothed_cross_entropy_reference(*leaves, target, 0.0)
    torch.testing.assert_close(ours, linear_cross_entropy_reference(*leaves, target))
    smoothing = LabelSmoothing(0.0, 11, 11)
    torch.testing.assert_close(linear_cross_entropy(*leaves, target, None, smoothing=smoothing), ours)
