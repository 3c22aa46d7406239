"""Tests the views of fine-tuning tasks: they depend only on the generator, and evaluation uses the whole image."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from beit3_ds.data.images.one_view import AugmentedView, PairView, ResizedView
from beit3_ds.data.images.rand_augment import OPERATIONS, RandAugment

PLAIN = AugmentedView(
    image_size=24,
    min_crop_scale=1.0,
    flip_probability=0.0,
    distortion=RandAugment(num_operations=0, magnitude=7),
    color_jitter=0.0,
    erasing_probability=0.0,
)


def picture(width: int = 48, height: int = 48) -> Image.Image:
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:, width // 2 :] = 255
    return Image.fromarray(pixels)


def test_a_resized_view_keeps_the_edges_of_a_wide_image() -> None:
    view = ResizedView(image_size=8)(picture(64, 16), np.random.default_rng(0))
    assert view.shape == (3, 8, 8)
    assert view[0, 0, 0] == -1 and view[0, 0, -1] == 1  # catches a crop in the middle, whose sides are alike


def test_draws_follow_from_the_generator() -> None:
    transform = dataclasses.replace(
        PLAIN,
        min_crop_scale=0.3,
        flip_probability=0.5,
        distortion=RandAugment(num_operations=2, magnitude=9),
        color_jitter=0.4,
        erasing_probability=0.5,
    )
    views = [transform(picture(), np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert torch.equal(views[0], views[1]) and not torch.equal(views[0], views[2])
    assert all(view.shape == (3, 24, 24) and view.dtype == torch.float32 for view in views)


def test_no_flip_keeps_left_and_right() -> None:
    distorted = dataclasses.replace(PLAIN, distortion=RandAugment(num_operations=2, magnitude=7))
    for seed in range(20):
        view = distorted(picture(), np.random.default_rng(seed))
        assert view[:, :, 18:].mean() > view[:, :, :6].mean()  # catches an operation that mirrors or inverts
    flipped = dataclasses.replace(PLAIN, flip_probability=1.0)(picture(), np.random.default_rng(0))
    assert flipped[:, :, :6].mean() > flipped[:, :, 18:].mean()


def test_erasing_changes_one_rectangle() -> None:
    before = PLAIN(picture(), np.random.default_rng(3))
    after = dataclasses.replace(PLAIN, erasing_probability=1.0)(picture(), np.random.default_rng(3))
    changed = (before != after).any(0)
    rows, columns = changed.any(1), changed.any(0)
    assert 0 < changed.sum() == rows.sum() * columns.sum() < 24 * 24 / 2


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_size_and_mode(name: str) -> None:
    for level, sign in ((0.0, 1.0), (1.0, -1.0)):
        result = OPERATIONS[name](picture(30, 20), level, sign)
        assert (result.size, result.mode) == ((30, 20), "RGB")


@pytest.mark.parametrize("text", ["the dog on the left", "Right side", "the leftmost one", "a right-hand drive"])
def test_images_of_texts_that_name_a_side_are_not_flipped(text: str) -> None:
    always = dataclasses.replace(PLAIN, flip_probability=1.0)
    views = PairView(default=always, unflipped=PLAIN)
    rng = np.random.default_rng(0)
    assert views.of(text)(picture(), rng)[0, 0, 0] == -1 and views.of("a dog", text)(picture(), rng)[0, 0, 0] == -1
    assert views.of("a bright dog")(picture(), rng)[0, 0, 0] == 1  # "bright" names no side
    assert views.of()(picture(), rng)[0, 0, 0] == 1
