"""Tests that the caption head sums losses and correct predictions over masked tokens."""

import dataclasses

import pytest
import torch

from beit3_ds.batch import PackedBatch
from beit3_ds.kernels.ops.label_smoothing import smoothed_cross_entropy_reference
from beit3_ds.model import StepFeatures, initialize_parameters
from beit3_ds.tasks.captioning.head import TARGET_IDS, CaptionHead, sum_best_tokens
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


def build_head(smoothing: float) -> CaptionHead:
    head = CaptionHead(CONFIG, label_smoothing=smoothing)
    initialize_parameters(head, CONFIG, seed=0)
    return head


def batch_of(ids: list[int]) -> PackedBatch:
    targets = {TARGET_IDS: torch.tensor(ids, dtype=torch.int64)}
    return dataclasses.replace(random_batch(CONFIG, 0, 2, 0), targets=targets)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sums_over_tokens(smoothing: float) -> None:
    head, h_MD = build_head(smoothing), torch.randn(5, CONFIG.hidden_size)
    logits = head(h_MD, batch_of([]), False)
    ids = logits.argmax(1)
    ids[1] = (ids[1] + 1) % CONFIG.text_vocab_size
    loss, correct = head(h_MD, batch_of(ids.tolist()), True)
    expected = smoothed_cross_entropy_reference(h_MD, head.mlm.weight, head.mlm.bias, ids, smoothing)
    torch.testing.assert_close(loss, expected.sum())
    assert correct == 4


def test_the_worst_tokens_are_dropped() -> None:
    losses = torch.tensor([3.0, 1.0, 9.0, 2.0, 4.0], requires_grad=True)
    sums = sum_best_tokens(StepFeatures({"loss": losses, "correct": torch.tensor([0, 1, 0, 1, 0])}, {}), 0.2)
    assert (sums / 5).tolist() == pytest.approx([2.5, 0.4])  # the mean of the four best
    sums[0].backward()
    assert losses.grad.tolist() == pytest.approx([5 / 4, 5 / 4, 0, 5 / 4, 5 / 4])
    nothing = StepFeatures({"loss": torch.empty(0), "correct": torch.empty(0, dtype=torch.int64)}, {})
    assert sum_best_tokens(nothing, 0.2).tolist() == [0, 0]


def test_no_tokens_give_zeros() -> None:
    head = build_head(0.1)
    sums = head(torch.empty(0, CONFIG.hidden_size), batch_of([]), True)
    sums.sum().backward()
    assert sums.tolist() == [0, 0]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
