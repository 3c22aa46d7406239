"""Tests that the statement head joins the right rows of the two pairs of a sample."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.nlvr2.head import LABELS, StatementHead
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


def build_head() -> StatementHead:
    head = StatementHead(CONFIG)
    initialize_parameters(head, CONFIG, seed=0)
    return head


def batch_of(labels: list[int]) -> PackedBatch:
    batch = random_batch(CONFIG, 0, 2 * len(labels), 0)
    picked = batch.layout.first_rows(1, 2)
    targets = {LABELS: torch.tensor(labels, dtype=torch.int64)}
    return dataclasses.replace(batch, head_rows=picked.rows, head_row_counts=picked.counts, targets=targets)


def rows_of(cls: Tensor, bos: Tensor) -> Tensor:
    return torch.cat([cls, bos])


def test_sums_over_samples() -> None:
    head, batch = build_head(), batch_of([1, 0, 1])
    cls, bos = torch.randn(2, 6, CONFIG.hidden_size)
    logits = head(rows_of(cls, bos), batch, False)
    for sample in range(3):  # catches pairs that are joined across samples
        one = slice(2 * sample, 2 * sample + 2)
        alone = head(rows_of(cls[one], bos[one]), batch_of([1]), False)
        torch.testing.assert_close(alone, logits[sample : sample + 1])
    loss, correct = head(rows_of(cls, bos), batch, True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.targets[LABELS], reduction="sum"))
    assert correct == (logits.argmax(1) == batch.targets[LABELS]).sum()


def test_no_samples_give_zeros() -> None:
    head = build_head()
    sums = head(torch.empty(0, CONFIG.hidden_size), batch_of([]), True)
    sums.sum().backward()
    assert sums.tolist() == [0, 0]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
