"""Tests crops of images with label maps, whole images, and sliding windows."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from beit3_ds.tasks.segmentation.augmentation import CropAugmentation, scaled_size, window_starts
from beit3_ds.tasks.segmentation.config import IGNORED, SegmentationConfig
from beit3_ds.tasks.segmentation.distortion import distort, turn_hue
from beit3_ds.tasks.segmentation.sliding import SlidingWindows

PLAIN = {"max_class_share": 1.0, "flip_probability": 0.0, "distorts": False}


def _picture_of_labels(labels: np.ndarray) -> Image.Image:
    """Returns an image whose red channel is ten times the label, which reveals a wrong alignment."""
    pixels = np.zeros((*labels.shape, 3), dtype=np.uint8)
    pixels[..., 0] = 10 * labels
    return Image.fromarray(pixels)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_labels_stay_with_their_pixels(flip: float, seed: int) -> None:
    labels = np.kron(np.arange(12).reshape(3, 4), np.ones((40, 40))).astype(np.uint8)  # cells of 40 pixels
    augmentation = CropAugmentation(size=64, min_scale=0.4, max_scale=2.0, **PLAIN | {"flip_probability": flip})
    view, own = augmentation(_picture_of_labels(labels), labels, np.random.default_rng(seed))
    red = (view[0] + 1) * 127.5 / 10
    known = torch.from_numpy(own.copy()) != IGNORED
    difference = (red - torch.from_numpy(own.astype(np.float32))).abs()[known]
    assert (difference < 0.4).float().mean() > 0.8  # all but the borders of cells, where pixels are mixed
    assert (view[:, ~known] == 0).all()  # beyond a small image


def test_a_flip_mirrors_the_crop() -> None:
    labels = np.arange(64 * 64).reshape(64, 64).astype(np.uint8) % 200
    plain, flipped = (
        CropAugmentation(size=64, min_scale=1.0, max_scale=1.0, **PLAIN | {"flip_probability": share})(
            _picture_of_labels(labels // 10), labels, np.random.default_rng(0)
        )
        for share in (0.0, 1.0)
    )
    torch.testing.assert_close(plain[0].flip(-1), flipped[0])
    assert (plain[1][:, ::-1] == flipped[1]).all()


def test_crops_avoid_a_single_class() -> None:
    labels = np.zeros((200, 200), dtype=np.uint8)
    labels[:, 150:] = 1
    image, shares = Image.new("RGB", (200, 200)), []
    augmentation = CropAugmentation(size=50, min_scale=1.0, max_scale=1.0, **PLAIN | {"max_class_share": 0.75})
    narrow = CropAugmentation(size=50, min_scale=3.0, max_scale=3.0, **PLAIN | {"max_class_share": 0.75})
    for seed in range(20):
        _, own = augmentation(image, labels, np.random.default_rng(seed))
        shares.append((own == 0).mean())
        narrow(image, labels, np.random.default_rng(seed))  # may find no such crop, and gives up
    assert max(shares) <= 0.76


@given(st.integers(1, 400), st.integers(1, 100), st.integers(1, 100))
def test_windows_cover_a_side(side: int, window: int, stride: int) -> None:
    window = min(window, side)
    stride = min(stride, window)
    starts = window_starts(side, window, stride)
    covered = {pixel for start in starts for pixel in range(start, start + window)}
    assert covered == set(range(side)) and starts[0] == 0 and len(set(starts)) == len(starts)


def test_sides_are_multiples_of_32() -> None:
    assert scaled_size((600, 800), 896) == (896, 1184)
    assert scaled_size((10, 300), 16) == (32, 480)


def test_scores_of_windows_scales_and_flips_are_averaged() -> None:
    """Checks that scores that depend only on the pixel are returned unchanged by windows, scales and flips."""
    settings = SegmentationConfig(
        num_classes=3, window_stride=40, scales=(0.5, 1.0, 1.5), flips=True, windows_per_batch=2
    )
    windows = SlidingWindows(settings, 64)
    columns = np.linspace(0, 255, 128).astype(np.uint8)
    image = Image.fromarray(np.broadcast_to(columns[None, :, None], (96, 128, 3)).copy())
    sizes = []

    def score(batches):  # type: ignore[no-untyped-def]
        for batch in batches:
            sizes.append(len(batch))
            views = torch.stack(list(batch)) if batch else torch.empty(0, 3, 32, 32)
            yield torch.stack([-views[:, 0] - 0.5, 0.4 - views[:, 0].abs(), views[:, 0] - 0.5], 1)

    least = len(windows.plan([image.size[::-1]])) + 3
    (found,) = windows.predict([image], score, least)
    assert len(sizes) == least and sizes[-3:] == [0, 0, 0] and max(sizes) == 2
    shades = torch.from_numpy(columns.astype(np.float32)) / 127.5 - 1
    expected = torch.stack([-shades - 0.5, 0.4 - shades.abs(), shades - 0.5]).argmax(0)
    assert (found == expected).float().mean() > 0.97 and found.dtype == torch.uint8


def test_distortion_keeps_grey_grey_and_the_range() -> None:
    rng = np.random.default_rng(0)
    grey = torch.full((3, 4, 4), 100.0)
    for _ in range(20):
        assert torch.allclose(*(channel for channel in distort(grey, rng)[:2]), atol=1e-2)
        noisy = distort(torch.rand(3, 8, 8) * 255, rng)
        assert noisy.min() >= 0 and noisy.max() <= 255
    torch.testing.assert_close(turn_hue(1.0), torch.eye(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(turn_hue(0.3) @ turn_hue(0.7), torch.eye(3), atol=1e-4, rtol=0)
