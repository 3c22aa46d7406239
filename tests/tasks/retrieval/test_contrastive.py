"""Compares the blockwise contrastive loss with a plain implementation, and tests which candidates are left out."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.model import StepFeatures
from beit3_ds.tasks.retrieval import contrastive
from beit3_ds.tasks.retrieval.contrastive import IMAGE_IDS, TEXT_IDS, contrastive_sums
from beit3_ds.tasks.retrieval.head import IMAGE_FEATURES, SCALE, TEXT_FEATURES


def build_features(count: int, image_ids: list[int] | None = None, text_ids: list[int] | None = None) -> StepFeatures:
    generator = torch.Generator().manual_seed(count)
    image, text = (F.normalize(torch.randn(count, 8, generator=generator), dim=1) for _ in range(2))
    rows = {
        IMAGE_FEATURES: image.requires_grad_(),
        TEXT_FEATURES: text.requires_grad_(),
        IMAGE_IDS: torch.tensor(image_ids or range(count)),
        TEXT_IDS: torch.tensor(text_ids or range(count)),
    }
    return StepFeatures(rows, {SCALE: torch.tensor([5.0], requires_grad=True)})


def leaves(features: StepFeatures) -> list[Tensor]:
    return [features.rows[IMAGE_FEATURES], features.rows[TEXT_FEATURES], features.shared[SCALE]]


@pytest.mark.parametrize("elements", [3, 40, 1 << 20])
def test_blocks_have_the_loss_and_gradients_of_the_whole(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a wrong result for a shorter last block, and a block that counts its partners from its own start."""
    monkeypatch.setattr(contrastive, "_BLOCK_ELEMENTS", elements)
    features = build_features(11)
    sums = contrastive_sums(features, mask_duplicates=True)
    score = 5 * features.rows[IMAGE_FEATURES] @ features.rows[TEXT_FEATURES].t()
    score = features.shared[SCALE] / 5 * score
    labels = torch.arange(11)
    losses = [F.cross_entropy(x, labels, reduction="sum") for x in (score, score.t())]
    found = [(x.argmax(1) == labels).sum().float() for x in (score, score.t())]
    torch.testing.assert_close(sums, torch.stack([*losses, *found]), rtol=1e-6, atol=1e-6)
    weights = torch.tensor([0.7, 0.3])
    ours = torch.autograd.grad((sums[:2] * weights).sum(), leaves(features))
    theirs = torch.autograd.grad((torch.stack(losses) * weights).sum(), leaves(features))
    for gradient, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)


def test_duplicates_are_no_negatives() -> None:
    """Checks that duplicates are not negatives, in either direction.

    Two captions of one image lose a candidate, and so does one caption of two images.
    """
    features = build_features(4, image_ids=[7, 7, 8, 9], text_ids=[1, 2, 3, 3])
    masked = contrastive_sums(features, mask_duplicates=True)
    score = 5 * features.rows[IMAGE_FEATURES] @ features.rows[TEXT_FEATURES].t()
    score[[0, 1, 2, 3], [1, 0, 3, 2]] = -math.inf
    labels = torch.arange(4)
    expected = torch.stack([F.cross_entropy(x, labels, reduction="sum") for x in (score, score.t())])
    torch.testing.assert_close(masked[:2], expected)
    assert (contrastive_sums(features, mask_duplicates=False)[:2] > masked[:2]).all()


def test_a_step_without_pairs_has_zero_sums_and_gradients() -> None:
    features = build_features(0)
    sums = contrastive_sums(features, mask_duplicates=True)
    assert sums.tolist() == [0, 0, 0, 0]
    gradients = torch.autograd.grad(sums.sum(), leaves(features), materialize_grads=True)
    assert [tuple(x.shape) for x in gradients] == [(0, 8), (0, 8), (1,)] and float(gradients[2]) == 0
