"""Compares the loss terms of a step with cross entropy in plain PyTorch."""

import torch
import torch.nn.functional as F

from beit3_ds.model import StepFeatures
from beit3_ds.tasks.imagenet.head import CLASSES
from beit3_ds.tasks.imagenet.loss import class_terms
from beit3_ds.tasks.imagenet.mixing import WHOLE
from beit3_ds.tasks.imagenet.packing import OTHER_CLASSES, SHARES, TEXT_CLASSES
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES


def step(images: torch.Tensor, texts: torch.Tensor, text_classes: list[int], **targets: list[int]) -> StepFeatures:
    integers = {TEXT_CLASSES: text_classes, **targets}
    rows = {name: torch.tensor(values) for name, values in integers.items()}
    return StepFeatures({IMAGE_FEATURES: images, TEXT_FEATURES: texts, **rows}, {SCALE: torch.tensor([5.0])})


def test_the_target_is_that_of_mixed_and_smoothed_labels() -> None:
    torch.manual_seed(0)
    images, texts = torch.randn(3, 8), torch.randn(4, 8)
    order = [2, 0, 3, 1]  # texts come in any order
    targets = {CLASSES: [1, 3, 0], OTHER_CLASSES: [1, 0, 2], SHARES: [WHOLE, WHOLE // 4, WHOLE // 2]}
    found = class_terms(step(images, texts[order], order, **targets), label_smoothing=0.1)
    logits = 5 * images @ texts.T
    mixed = torch.tensor([[0, 1.0, 0, 0], [0.75, 0, 0, 0.25], [0.5, 0, 0.5, 0]])
    expected = F.cross_entropy(logits, 0.9 * mixed + 0.1 / 4, reduction="sum")
    torch.testing.assert_close(found[0], expected)
    assert found[1] == (logits.argmax(1) == torch.tensor(targets[CLASSES])).sum()


def test_texts_of_one_class_count_once() -> None:
    torch.manual_seed(1)
    images, texts = torch.randn(2, 8), torch.randn(3, 8)
    targets = {CLASSES: [7, 9], OTHER_CLASSES: [7, 9], SHARES: [WHOLE, WHOLE]}
    found = class_terms(step(images, texts, [9, 7, 9], **targets), label_smoothing=0.0)
    classes = torch.stack([texts[1], (texts[0] + texts[2]) / 2])
    torch.testing.assert_close(found[0], F.cross_entropy(5 * images @ classes.T, torch.tensor([0, 1]), reduction="sum"))


def test_a_step_without_images_has_sums_of_zero_and_gradients() -> None:
    texts = torch.randn(2, 8, requires_grad=True)
    targets: dict[str, list[int]] = {CLASSES: [], OTHER_CLASSES: [], SHARES: []}
    features = step(torch.randn(0, 8), texts, [0, 1], **targets)
    rows = {name: x.long() if name in targets else x for name, x in features.rows.items()}
    sums = class_terms(StepFeatures(rows, features.shared), label_smoothing=0.1)
    sums.sum().backward()
    assert not sums.any() and texts.grad is not None and not texts.grad.any()
