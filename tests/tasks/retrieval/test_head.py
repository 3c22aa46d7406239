"""Tests that contrastive features have length 1, and that the scale stays below its limit but can fall again."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from beit3_ds.model import initialize_parameters
from beit3_ds.tasks.retrieval.head import ContrastiveHead
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


def build_head() -> ContrastiveHead:
    head = ContrastiveHead(CONFIG)
    initialize_parameters(head, CONFIG, seed=0)
    return head


def test_features_and_ids() -> None:
    head, ids = build_head(), torch.tensor([7, 5])
    batch = dataclasses.replace(random_batch(CONFIG, 2, 0, 3), targets={"ids": ids})
    h_MD = torch.randn(5, CONFIG.hidden_size)
    features = head(h_MD, batch, True)
    torch.testing.assert_close(features.rows["image"], F.normalize(h_MD[:2] @ head.image.weight.t()))
    torch.testing.assert_close(features.rows["text"], F.normalize(h_MD[2:] @ head.text.weight.t()))
    assert torch.equal(features.rows["ids"], ids)
    torch.testing.assert_close(features.shared["scale"], torch.tensor([1 / 0.07]))


def test_no_samples_give_zero_gradients() -> None:
    head = build_head()
    batch = dataclasses.replace(random_batch(CONFIG, 0, 0, 0), targets={})
    features = head(torch.empty(0, CONFIG.hidden_size), batch, True)
    sum(x.sum() for x in (*features.rows.values(), 0 * features.shared["scale"])).backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@pytest.mark.parametrize(("beyond", "upstream", "moves"), [(False, -1, True), (True, -1, False), (True, 1, True)])
def test_the_scale_returns_from_its_limit(beyond: bool, upstream: int, moves: bool) -> None:
    """Catches a plain clamp, whose zero gradient would keep the scale at 100 forever."""
    temperature = build_head().temperature
    with torch.no_grad():
        temperature.bias.fill_(math.log(100 * 0.07) + (0.5 if beyond else -0.5))
    scale = temperature()
    assert (scale == 100) == beyond or scale.isclose(torch.tensor(100.0))
    (upstream * scale).sum().backward()
    assert bool(temperature.bias.grad) == moves
