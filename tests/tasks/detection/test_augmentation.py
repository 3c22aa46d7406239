"""Tests the scale jitter: boxes, masks and pixels move together, as in torchvision, and only the key decides."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as v2

from beit3_ds.tasks.detection.augmentation import LargeScaleJitter, Window, fitted_window, visible_objects
from beit3_ds.tasks.detection.box_masks import masks_in_boxes
from beit3_ds.tasks.detection.files import StoredObject
from beit3_ds.tasks.detection.segmentations import Segmentation, whole_segmentation

HEIGHT, WIDTH = 90, 120
RING = np.array([[30.0, 20.0], [80.0, 20.0], [80.0, 60.0], [30.0, 60.0]], dtype=np.float32)
BOX = torch.tensor([30.0, 20.0, 80.0, 60.0])


def _jitter(**changes: object) -> LargeScaleJitter:
    fields: dict[str, object] = {"image_size": 96, "min_scale": 0.1, "max_scale": 2.0, "flip_probability": 0.5}
    return LargeScaleJitter(**fields | {"color_jitter": 0.0, "with_masks": True} | changes)  # type: ignore[arg-type]


def _image() -> Image.Image:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    waves = [120 + 100 * np.sin(rows / 9 + i) * np.cos(columns / 11 + i) for i in range(3)]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


@pytest.mark.parametrize("seed", range(12))
def test_it_equals_torchvisions_resize_crop_and_flip(seed: int) -> None:
    found = StoredObject(BOX, 3, Segmentation(rings=[RING]))
    jitter = _jitter(min_scale=0.5)
    window = jitter.draw((HEIGHT, WIDTH), np.random.default_rng(seed))
    pixels, objects = jitter(_image(), [found], np.random.default_rng(seed))
    height, width = window.size
    resized = [
        round(side * extent)
        for side, extent in (
            (HEIGHT, height / (window.bottom - window.top)),
            (WIDTH, width / (window.right - window.left)),
        )
    ]
    start = [round(value) for value in (window.top * resized[0] / HEIGHT, window.left * resized[1] / WIDTH)]
    mask = torch.from_numpy(whole_segmentation(Segmentation(rings=[RING]), (HEIGHT, WIDTH)))[None]
    inputs = (
        tv_tensors.Image(torch.from_numpy(np.array(_image())).permute(2, 0, 1)),
        tv_tensors.Mask(mask),
        tv_tensors.BoundingBoxes(BOX[None], format="XYXY", canvas_size=(HEIGHT, WIDTH)),
    )
    steps = [v2.crop(v2.resize(x, resized, antialias=True), *start, height, width) for x in inputs]
    expected, mask, box = [v2.horizontal_flip(x) if window.is_flipped else x for x in steps]
    inner = (slice(None), slice(3, -3), slice(3, -3))  # a filter of a crop does not see what is outside of it
    shown = (pixels + 1) * 127.5
    assert (shown[inner] - expected.float()[inner]).abs().max() < 4
    if not len(objects.labels):
        assert not mask.any()
        return
    box = v2.clamp_bounding_boxes(box)
    assert (objects.boxes - box.as_subclass(torch.Tensor)).abs().max() < 1.5  # the mask decides on a cut box
    seen = masks_in_boxes(mask.float(), torch.tensor([[0.0, 0.0, width, height]]), objects.boxes, 112)
    agreement = (seen[0] & objects.masks[0].bool()).sum() / (seen[0] | objects.masks[0].bool()).sum()
    assert agreement > 0.93 and objects.labels.tolist() == [3]


def test_draws_depend_on_the_generator_alone_and_cover_the_range() -> None:
    jitter = _jitter()
    windows = [jitter.draw((HEIGHT, WIDTH), np.random.default_rng(seed)) for seed in range(300)]
    assert windows == [jitter.draw((HEIGHT, WIDTH), np.random.default_rng(seed)) for seed in range(300)]
    longer = [max(window.size) for window in windows]
    assert min(longer) < 15 and max(longer) == 96
    assert 110 < sum(window.is_flipped for window in windows) < 190
    # Enlarged images are cut at places that differ.
    assert len({window.left for window in windows if window.size[1] == 96}) > 50


def test_an_object_that_is_cut_gets_the_box_of_its_visible_part() -> None:
    triangle = np.array([[10.0, 10.0], [90.0, 10.0], [10.0, 80.0]], dtype=np.float32)
    found = StoredObject(torch.tensor([10.0, 10.0, 90.0, 80.0]), 1, Segmentation(rings=[triangle]))
    window = Window(50.0, 0.0, 120.0, 90.0, (90, 70))
    objects = visible_objects([found], (HEIGHT, WIDTH), window, with_masks=True)
    # At column 50 the triangle reaches down to row 45, while its box reaches to row 80.
    assert (objects.boxes[0] - torch.tensor([0.0, 10.0, 40.0, 45.0])).abs().max() < 1.5
    gone = Window(91.0, 0.0, 120.0, 90.0, (90, 29))
    assert not len(visible_objects([found], (HEIGHT, WIDTH), gone, with_masks=True).labels)
    corner = Window(80.0, 60.0, 120.0, 90.0, (30, 40))  # in the box, but not in the mask
    assert not len(visible_objects([found], (HEIGHT, WIDTH), corner, with_masks=True).labels)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1)])
def test_images_of_one_pixel_on_a_side_work(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size[::-1], "red")
    box = torch.tensor([0.0, 0.0, size[1], size[0]])
    for seed in range(5):
        pixels, objects = _jitter(with_masks=False)(image, [StoredObject(box, 0, None)], np.random.default_rng(seed))
        assert min(pixels.shape[1:]) >= 1 and max(pixels.shape[1:]) <= 96 and len(objects.labels) == 1
    window = fitted_window(size, 96, is_flipped=True)
    assert max(window.size) == 96 and min(window.size) >= 1 and window.cut(image).shape[1:] == window.size
