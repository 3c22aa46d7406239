"""Tests that the linear head classifies the mean of an image's patches, without the CLS row."""

import dataclasses

import torch
import torch.nn.functional as F

from beit3_ds.batch import PackedBatch
from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.imagenet.head import CLASSES, LinearClassHead, patch_rows
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()
D, N = CONFIG.hidden_size, CONFIG.num_patches


def build_head(label_smoothing: float = 0.0) -> LinearClassHead:
    head = LinearClassHead(CONFIG, 7, label_smoothing=label_smoothing)
    initialize_parameters(head, CONFIG, seed=0)
    return head


def batch_of(classes: list[int]) -> PackedBatch:
    batch = random_batch(CONFIG, len(classes), 0, 0)
    picked = patch_rows(batch.layout)
    targets = {CLASSES: torch.tensor(classes, dtype=torch.int64)}
    return dataclasses.replace(batch, head_rows=picked.rows, head_row_counts=picked.counts, targets=targets)


def test_sums_over_images() -> None:
    head, batch = build_head(), batch_of([3, 0])
    x_TD = torch.randn(batch.num_rows, D)
    logits = head(x_TD[batch.head_rows], batch, False)
    means = x_TD.view(2, 1 + N, D)[:, 1:].mean(1)
    torch.testing.assert_close(logits, head.classes(F.layer_norm(means, (D,))))
    loss, correct = head(x_TD[batch.head_rows], batch, True)
    torch.testing.assert_close(loss, F.cross_entropy(logits, batch.targets[CLASSES], reduction="sum"))
    assert correct == (logits.argmax(1) == batch.targets[CLASSES]).sum()


def test_labels_are_smoothed_over_all_classes() -> None:
    head, batch = build_head(0.2), batch_of([3, 0])
    x_TD = torch.randn(len(batch.head_rows), D)
    log_probabilities = head(x_TD, batch, False).log_softmax(1)
    target = torch.full((2, 7), 0.2 / 7)
    target[0, 3] += 0.8
    target[1, 0] += 0.8
    torch.testing.assert_close(head(x_TD, batch, True)[0], -(target * log_probabilities).sum())


def test_no_images_give_zeros() -> None:
    head = build_head()
    sums = head(torch.empty(0, D), batch_of([]), True)
    sums.sum().backward()
    assert sums.tolist() == [0, 0]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())
