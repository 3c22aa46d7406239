"""Tests that the loss of an evaluation is the loss of training."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.parallel import TensorParallel, VocabParallelHead
from beit3_ds.tasks.captioning.evaluation import smoothed_loss


@given(st.sampled_from([0.0, 0.1, 0.5]), st.integers(0, 99))
def test_equals_the_loss_of_training(smoothing: float, seed: int) -> None:
    torch.manual_seed(seed)
    head = VocabParallelHead(6, 11, 4, TensorParallel(), smoothing)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    h, targets = torch.randn(5, 6), torch.randint(11, (5,))
    expected = head(h, targets).loss.double()
    found = smoothed_loss(head.logits(h), targets, smoothing)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_certain_right_word_costs_the_smoothing_alone() -> None:
    logits = torch.tensor([[0.9, 0.05, 0.05]]).log()
    assert smoothed_loss(logits, torch.tensor([0]), 0.1).item() == pytest.approx(0, abs=1e-6)
