"""Tests augmentation: two views of one crop, drawn from one generator."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch.nn.functional import avg_pool2d

from beit3_ds.data.images import augmentation
from beit3_ds.data.images.augmentation import Augmentation, CenterViews, ViewTransform, random_crop_box
from beit3_ds.pixels import to_floats


def _position_image(width: int = 240, height: int = 160) -> Image.Image:
    """Returns an image whose red channel encodes the column and whose green channel encodes the row."""
    red, green = np.meshgrid(np.linspace(40, 200, width), np.linspace(40, 200, height))
    return Image.fromarray(np.stack([red, green, np.full_like(red, 100)], axis=-1).astype(np.uint8))


def _augmentation(**changes: float) -> Augmentation:
    values = {"min_crop_scale": 0.2, "color_jitter": 0.4, "flip_probability": 0.5} | changes
    return Augmentation(image_size=32, tokenizer_image_size=64, **values)


def _floats(transform: ViewTransform, image: Image.Image, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """Returns the two views as the values that the networks read."""
    views = transform(image, rng)
    assert views.model.dtype == views.tokenizer.dtype == torch.uint8
    colors = None if views.colors is None else views.colors[None]
    return to_floats(views.model[None], colors)[0], to_floats(views.tokenizer[None], colors)[0]


@pytest.mark.parametrize("jitter", [0.0, 0.4])
def test_both_views_show_the_same_crop_in_the_same_colors(jitter: float) -> None:
    augmentation = _augmentation(color_jitter=jitter)
    for seed in range(30):
        model_view, tokenizer_view = _floats(augmentation, _position_image(), np.random.default_rng(seed))
        assert model_view.shape == (3, 32, 32)
        assert tokenizer_view.shape == (3, 64, 64)
        # catches a second crop, flip or jitter for the tokenizer; what remains is rounding and the two filters
        torch.testing.assert_close(avg_pool2d(tokenizer_view, 2), model_view, atol=0.05, rtol=0)


def test_draws_come_from_the_generator_alone() -> None:
    first, second, other = (
        _floats(_augmentation(), _position_image(), np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)  # catches draws from a global generator
    assert not torch.equal(first, other)


def _jitter_by_pillow(image: Image.Image, box: tuple[int, ...], rng: np.random.Generator) -> Image.Image:
    """Computes the reference: colour jitter of the crop in 8 bits before any resizing, with equal random draws."""
    crop = image.crop(box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for kind in rng.permutation(3):
        enhance = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[kind](crop).enhance
        crop = enhance(rng.uniform(0.6, 1.4))
    return crop


@pytest.mark.parametrize(("low", "high", "largest", "mean"), [(70, 105, 6, 1.8), (0, 255, 100, 3.5)])
def test_views_equal_those_of_jitter_before_resize(low: int, high: int, largest: float, mean: float) -> None:
    noise = np.random.default_rng(0).integers(low, high + 1, (40, 60, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((240, 160), Image.Resampling.BICUBIC)
    differences = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        reference = _jitter_by_pillow(image, random_crop_box(image.size, 0.2, rng), rng)
        views = _floats(_augmentation(), image, np.random.default_rng(seed))
        filters = (Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)
        for view, resample in zip(views, filters, strict=True):
            expected = np.asarray(reference.resize(view.shape[1:], resample)).transpose(2, 0, 1)
            differences.append(np.abs((view.numpy() + 1) * 127.5 - expected))
    # Nothing is clamped in the first case, so only rounding remains. Catches an exchanged filter, factor or mean.
    assert max(difference.max() for difference in differences) <= largest
    # The second is the worst for cutting off: noise over all levels.
    assert np.mean([difference.mean() for difference in differences]) <= mean


def test_pillow_computes_lanczos_where_torch_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches another resampling filter, swapped sides, and colour values that are not bytes."""
    pixels = augmentation.image_pixels(_position_image())
    views = []
    for torch_can in (False, augmentation._torch_has_lanczos()):
        monkeypatch.setattr(augmentation, "_torch_has_lanczos", lambda can=torch_can: can)
        views.append(augmentation.resize_pixels(pixels, 64, "lanczos"))
    assert views[0].dtype == torch.uint8 and views[0].shape == (3, 64, 64)
    assert (views[0].int() - views[1].int()).abs().max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (300, 1), (2, 500)])
def test_thin_images_give_whole_views(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    for view in _floats(_augmentation(color_jitter=0), image, np.random.default_rng(0)):
        expected = torch.tensor([10.0, 20.0, 30.0]).view(3, 1, 1).expand_as(view) / 127.5 - 1
        torch.testing.assert_close(view, expected)


def test_crop_area_and_position_vary() -> None:
    boxes = [random_crop_box((240, 160), 0.2, np.random.default_rng(seed)) for seed in range(500)]
    shares = [(right - left) * (bottom - top) / (240 * 160) for left, top, right, bottom in boxes]
    assert min(shares) == pytest.approx(0.2, abs=0.03)  # catches a scale that counts sides instead of area
    assert max(shares) > 0.85
    assert len({box[:2] for box in boxes}) > 300


@given(width=st.integers(1, 300), height=st.integers(1, 300), scale=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_crop_lies_in_the_image(width: int, height: int, scale: float, seed: int) -> None:
    left, top, right, bottom = random_crop_box((width, height), scale, np.random.default_rng(seed))
    # catches an empty crop of a thin image, and exchanged width and height
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


def test_very_wide_image_gets_the_middle() -> None:
    assert random_crop_box((1000, 90), 0.9, np.random.default_rng(0)) == (440, 0, 560, 90)


@pytest.mark.parametrize(("probability", "rises"), [(0.0, True), (1.0, False)])
def test_flip(probability: float, rises: bool) -> None:
    augmentation = _augmentation(flip_probability=probability, color_jitter=0)
    view, _ = _floats(augmentation, _position_image(), np.random.default_rng(0))
    assert bool(view[0, :, -1].mean() > view[0, :, 0].mean()) is rises
    assert view[1, -1].mean() > view[1, 0].mean()  # catches a flip of top and bottom


def test_jitter_changes_brightness_within_its_bounds() -> None:
    grey = Image.new("RGB", (50, 50), (100, 100, 100))
    means = [float(_floats(_augmentation(), grey, np.random.default_rng(seed))[0].mean()) for seed in range(300)]
    levels = (np.array(means) + 1) * 127.5
    # on plain grey, contrast and saturation change nothing, so this is the brightness factor alone
    assert levels.min() == pytest.approx(60, abs=2)
    assert levels.max() == pytest.approx(140, abs=2)


def test_pixels_lie_between_minus_one_and_one() -> None:
    views = CenterViews(image_size=32, tokenizer_image_size=64)
    for level, expected in ((0, -1.0), (255, 1.0)):
        model_view, _ = _floats(views, Image.new("RGB", (40, 40), (level,) * 3), np.random.default_rng(0))
        assert model_view.dtype == torch.float32
        assert torch.equal(model_view, torch.full((3, 32, 32), expected))  # catches [0, 1] and ImageNet statistics


def test_center_views_show_the_middle_square() -> None:
    views = CenterViews(image_size=32, tokenizer_image_size=64)
    model_view, tokenizer_view = _floats(views, _position_image(), np.random.default_rng(0))
    torch.testing.assert_close(avg_pool2d(tokenizer_view, 2), model_view, atol=0.05, rtol=0)
    red = (model_view[0, 0] + 1) * 127.5
    # columns 40 to 200 of 240; catches a squeezed image (40 to 200 levels) and a crop at the left
    assert red[0].item() == pytest.approx(40 + 160 * 42 / 239, abs=4)
    assert red[-1].item() == pytest.approx(40 + 160 * 198 / 239, abs=4)


class _SmallestCrop(np.random.Generator):
    """Draws the lower end of every interval, which gives the smallest area and the narrowest aspect ratio."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low: float, high: float) -> float:  # type: ignore[override]
        return low


@given(st.floats(0.05, 0.7))  # of a square, larger areas do not fit with the narrowest aspect
def test_no_view_of_a_large_enough_image_is_enlarged(scale: float) -> None:
    """Catches a bound that ignores the aspect ratio, or that decodes more pixels than needed."""
    side = _augmentation(min_crop_scale=scale).min_side
    assert side is not None
    left, top, right, bottom = random_crop_box((side, side), scale, _SmallestCrop())
    assert 64 <= min(right - left, bottom - top) <= 66  # the larger view, and what rounding up may add
    assert _augmentation(min_crop_scale=0.0).min_side is None
