"""Draws images of shapes at random positions and sizes, and writes their boxes and masks in COCO's format."""

# H and W rows and columns of an image.

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from beit3_ds.sample_data.scenes import COLORS, SHAPES, draw_shape

CATEGORY_IDS = {name: 3 * number + 2 for number, name in enumerate(SHAPES)}
"""Category id of each shape; the ids have gaps, like COCO's."""

_OVERSAMPLING = 4
_MOST_OBJECTS = 5
_EMPTY_SHARE = 0.05  # images without objects
_LEAST_VISIBLE = 0.35  # minimum visible share of a shape; other shapes are no objects


class DrawnShape(NamedTuple):
    """Describes one shape of an image."""

    shape: str
    """Name of the shape, one of `SHAPES`."""
    color: tuple[int, ...]
    """RGB colour of the shape."""
    x: float
    """Horizontal position of the centre, as a share of the image's width."""
    y: float
    """Vertical position of the centre, as a share of the image's height."""
    radius: float
    """Half the side of the shape's box, as a share of the image's shorter side."""


def write_object_scenes(folder: Path, split: str, count: int, rng: random.Random, size: int) -> None:
    """Writes images and `objects-SPLIT.json`, an annotation file in COCO's format.

    A shape of which less than 35% is visible is drawn but not stored. A square, bar or triangle is stored as a polygon
    if it is fully visible. Every other stored shape is stored as run lengths. Some images have no objects.

    Args:
        folder: folder of the dataset.
        split: name of the split.
        count: number of images.
        rng: random generator.
        size: longer side of the images in pixels; the shorter side has 75% to 100% of this length.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    pictures = folder / "images" / f"objects-{split}"
    pictures.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = (size, round(size * rng.uniform(0.75, 1)))
        if rng.random() < 0.5:
            width, height = height, width
        shapes = [] if rng.random() < _EMPTY_SHARE else _draw_shapes(rng)
        image, masks = draw_shapes(shapes, width, height, rng)
        name = f"objects-{split}/{number:06}.png"
        image.save(folder / "images" / name)
        identifier = 9 + 16 * number
        images.append({"id": identifier, "file_name": name, "width": width, "height": height})
        for shape, mask, is_whole in masks:
            found = _annotate(shape, mask, is_whole, width, height)
            annotations.append({"id": len(annotations) + 1, "image_id": identifier, **found})
    categories = [{"id": identifier, "name": name} for name, identifier in CATEGORY_IDS.items()]
    content = {"images": images, "categories": categories, "annotations": annotations}
    (folder / f"objects-{split}.json").write_text(json.dumps(content))


def _draw_shapes(rng: random.Random) -> list[DrawnShape]:
    shapes = []
    for _ in range(rng.randint(1, _MOST_OBJECTS)):
        shade = rng.uniform(0.88, 1.08)
        color = tuple(min(255, round(shade * value)) for value in COLORS[rng.choice(list(COLORS))])
        radius = rng.uniform(0.09, 0.26)
        x, y = rng.uniform(radius, 1 - radius), rng.uniform(radius, 1 - radius)
        shapes.append(DrawnShape(rng.choice(SHAPES), color, x, y, radius))
    return shapes


def draw_shapes(
    shapes: list[DrawnShape], width: int, height: int, rng: random.Random
) -> tuple[Image.Image, list[tuple[DrawnShape, NDArray[np.bool_], bool]]]:
    """Draws shapes on a grey image; later shapes cover earlier ones.

    Args:
        shapes: shapes to draw.
        width: width of the image in pixels.
        height: height of the image in pixels.
        rng: random generator for the shade of the background.

    Returns:
        The image, and one tuple per visible shape. Shapes of which less than 35% is visible are left out. The tuple has
        the shape, the mask of the visible part, (height, width) bool, and whether the shape is fully visible.
    """
    wide, high, side = width * _OVERSAMPLING, height * _OVERSAMPLING, min(width, height) * _OVERSAMPLING
    grey = rng.randint(200, 250)
    image = Image.new("RGB", (wide, high), (grey, grey, grey))
    draw = ImageDraw.Draw(image)
    whole: list[NDArray[np.bool_]] = []
    visible: list[NDArray[np.bool_]] = []
    for shape in shapes:
        place = (shape.x * wide, shape.y * high, shape.radius * side)
        draw_shape(draw, shape.shape, *place, shape.color)
        mask = Image.new("L", (wide, high), 0)
        draw_shape(ImageDraw.Draw(mask), shape.shape, *place, (255,))
        covered = np.asarray(mask.resize((width, height), Image.Resampling.BOX)) >= 128
        visible = [other & ~covered for other in visible]
        whole.append(covered)
        visible.append(covered)
    found = [
        (shape, mask, bool(mask.sum() == all_of.sum()))
        for shape, mask, all_of in zip(shapes, visible, whole, strict=True)
        if mask.sum() >= _LEAST_VISIBLE * all_of.sum()
    ]
    return image.resize((width, height), Image.Resampling.BOX), found


def _annotate(shape: DrawnShape, mask: NDArray[np.bool_], is_whole: bool, width: int, height: int) -> dict[str, Any]:
    """Returns the COCO annotation of a shape, without the ids of annotation and image."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top = int(columns[0]), int(rows[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    corners = _corners(shape, width, height) if is_whole else None
    segmentation: Any = [corners] if corners else {"size": [height, width], "counts": run_lengths(mask)}
    return {
        "category_id": CATEGORY_IDS[shape.shape],
        "bbox": box,
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def _corners(shape: DrawnShape, width: int, height: int) -> list[float] | None:
    """Returns a shape's polygon as x, y, x, y, ... in pixels; None for crosses and for shapes with curved edges."""
    x, y, radius = shape.x * width, shape.y * height, shape.radius * min(width, height)
    thin = radius * 0.35
    match shape.shape:
        case "square":
            corners = [(-radius, -radius), (radius, -radius), (radius, radius), (-radius, radius)]
        case "bar":
            corners = [(-radius, -thin), (radius, -thin), (radius, thin), (-radius, thin)]
        case "triangle":
            corners = [(0, -radius), (radius, radius), (-radius, radius)]
        case _:
            return None
    return [round(value, 2) for dx, dy in corners for value in (x + dx, y + dy)]


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Returns the run lengths of a mask, column by column; runs of zeros and ones alternate, starting with zeros."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()
