"""Tests that mixed images contain the two images in the proportions of the mixed labels."""

import numpy as np
import pytest
import torch

from beit3_ds.tasks.imagenet.mixing import WHOLE, Mixing

OWN, OTHER = torch.ones(3, 32, 32), torch.zeros(3, 32, 32)


@pytest.mark.parametrize("strengths", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_the_share_is_that_of_the_pixels(strengths: tuple[float, float]) -> None:
    mixing = Mixing(mixup=strengths[0], cutmix=strengths[1], probability=1.0)
    shares, cuts = [], 0
    for seed in range(200):
        mixed, share = mixing(OWN, OTHER, np.random.default_rng(seed))
        assert mixed.mean().item() == pytest.approx(share / WHOLE, abs=1e-4)
        shares.append(share / WHOLE)
        cuts += set(mixed.unique().tolist()) <= {0.0, 1.0}
    assert 0.35 < np.mean(shares) < 0.7 and min(shares) < 0.1 and max(shares) > 0.9
    expected = {(0.8, 0.0): 0, (0.0, 1.0): 200}.get(strengths, 100)
    assert abs(cuts - expected) < 30  # mixup and CutMix, each with probability one half
    assert torch.equal(OWN, torch.ones(3, 32, 32)), "the image itself was changed"


def test_equal_generators_mix_alike() -> None:
    mixing = Mixing(mixup=0.8, cutmix=1.0, probability=0.5)
    first, second = (mixing(OWN, OTHER, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert 60 < sum(mixing.applies(np.random.default_rng(seed)) for seed in range(200)) < 140
    assert not Mixing(mixup=0.0, cutmix=0.0, probability=1.0).applies(np.random.default_rng(0))
