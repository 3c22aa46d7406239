"""Tests the answer head: sums do not depend on how a step is divided, and every parameter gets a gradient."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.vqa.head import ANSWER_SCORES, AnswerHead
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()
NUM_ANSWERS = 5


def build_head() -> AnswerHead:
    head = AnswerHead(CONFIG, NUM_ANSWERS)
    initialize_parameters(head, CONFIG, seed=0)
    return head


def batch_of(scores: Tensor) -> PackedBatch:
    batch = random_batch(CONFIG, 0, len(scores), 0)
    picked = batch.layout.first_rows(1)
    return dataclasses.replace(
        batch, head_rows=picked.rows, head_row_counts=picked.counts, targets={ANSWER_SCORES: scores}
    )


def test_sums_over_questions() -> None:
    head, h_PD, scores = build_head(), torch.randn(4, CONFIG.hidden_size), torch.rand(4, NUM_ANSWERS)
    logits = head(h_PD, batch_of(scores), False)
    loss, score = head(h_PD, batch_of(scores), True)
    expected = F.binary_cross_entropy_with_logits(logits, scores) * NUM_ANSWERS * 4
    torch.testing.assert_close(loss, expected)  # the reference's mean over elements, times the answers
    assert score == scores[range(4), logits.argmax(1)].sum()
    parts = [head(h_PD[rows], batch_of(scores[rows]), True) for rows in (slice(0, 1), slice(1, 4))]
    torch.testing.assert_close(parts[0] + parts[1], torch.stack([loss, score]))


def test_no_questions_give_zeros() -> None:
    head = build_head()
    sums = head(torch.empty(0, CONFIG.hidden_size), batch_of(torch.empty(0, NUM_ANSWERS)), True)
    sums.sum().backward()
    assert sums.tolist() == [0, 0]
    # A parameter without a gradient would stop ZeRO-3's reduction.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


def test_initial_values() -> None:
    head = build_head()
    assert (head.hidden_norm.weight == 1).all() and (head.pooler.norm.weight == 1).all()
    assert not head.answers.bias.any() and 0 < head.answers.weight.std() < 0.02
