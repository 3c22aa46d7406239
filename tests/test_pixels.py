"""Tests that batches of 8-bit images become the floats of images jittered one by one, bit for bit on a CPU."""

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3_ds.data.images.augmentation import draw_colors
from beit3_ds.pixels import to_floats


def jitter(views: list[Tensor], strength: float, rng: np.random.Generator) -> list[Tensor]:
    """Changes the colours of all views of one crop by scalars: brightness (0), contrast (1) and saturation (2)."""
    views = [view.float() for view in views]
    for kind in rng.permutation((0, 1, 2)):
        factor = rng.uniform(1 - strength, 1 + strength)
        mean = float(grey(views[0]).mean()) if kind == 1 else 0.0
        for view in views:
            other = grey(view) if kind == 2 else mean
            view.mul_(factor).add_(other * (1 - factor)).clamp_(0, 255)
    return [view.div_(127.5).sub_(1) for view in views]


def grey(view: Tensor) -> Tensor:
    return (view[0] * 0.299).add_(view[1], alpha=0.587).add_(view[2], alpha=0.114)


@pytest.mark.parametrize("size", [32, 35])
def test_many_images_get_the_colors_of_each(size: int) -> None:
    """Catches another order of draws, the mean of another view, and the colours of another image."""
    generator = torch.Generator().manual_seed(size)
    crops = [[torch.randint(0, 256, (3, s, s), generator=generator, dtype=torch.uint8) for s in (size, 24)]]
    crops += [[view.flip(-1) // 2 for view in crops[0]], [255 - view // 3 for view in crops[0]]]
    expected = [jitter(crop, 0.4, np.random.default_rng(seed)) for seed, crop in enumerate(crops)]
    colors = torch.stack([draw_colors(crop[0], 0.4, np.random.default_rng(seed)) for seed, crop in enumerate(crops)])
    for place in (0, 1):
        floats = to_floats(torch.stack([crop[place] for crop in crops]), colors)
        assert torch.equal(floats, torch.stack([views[place] for views in expected]))


def test_floats_stay_as_they_are() -> None:
    floats = torch.rand(2, 3, 4, 4)
    assert to_floats(floats) is floats
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 1, 1)
    torch.testing.assert_close(to_floats(levels)[:, 0, 0, 0], torch.tensor([-1.0, -0.6, 1.0]))
    assert to_floats(levels[:0], torch.empty(0, 3, 3)).shape == (0, 3, 1, 1)
