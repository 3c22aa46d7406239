"""Draws landscapes with shapes, and label maps of these landscapes, in the folder structure of ADE20K.

images/{training,validation}/NUMBER.png
annotations/{training,validation}/NUMBER.png      0: border between classes; 1 to 9: class
objectInfo150.txt                                 names of the classes, in ADE20K's format
"""

# H and W rows and columns of an image.

import random
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from beit3_ds.sample_data.scenes import COLORS, SHAPES, draw_shape

GROUNDS = {"sky": (150, 190, 235), "grass": (90, 150, 70), "sand": (214, 190, 140)}
"""RGB colour of each kind of ground, before noise is added."""
LABEL_NAMES = (*GROUNDS, *COLORS)
"""Class names in the order of the labels from 1: kinds of ground, then colours of shapes."""

_OVERSAMPLING = 4
_MOST_SHAPES = 3
_FOLDERS = {"train": "training", "validation": "validation"}
_NAMES_FILE = "objectInfo150.txt"


def write_label_scenes(folder: Path, split: str, count: int, rng: random.Random, size: int) -> None:
    """Writes the images and label maps of a split, and the file of class names.

    Args:
        folder: folder of the dataset.
        split: "train" or "validation".
        count: number of images.
        rng: random generator.
        size: shorter side of the images in pixels; the longer side is up to 1.5 times as long.
    """
    for kind in ("images", "annotations"):
        (folder / kind / _FOLDERS[split]).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        width, height = size, round(size * rng.uniform(1, 1.5))
        if rng.random() < 0.7:
            width, height = height, width
        image, labels = draw_label_scene(width, height, rng)
        image.save(folder / "images" / _FOLDERS[split] / f"{number:06}.png")
        Image.fromarray(labels).save(folder / "annotations" / _FOLDERS[split] / f"{number:06}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{index}\t0\t0\t0\t{int(name in GROUNDS)}\t{name}" for index, name in enumerate(LABEL_NAMES, start=1)]
    (folder / _NAMES_FILE).write_text("\n".join(lines) + "\n")


def draw_label_scene(width: int, height: int, rng: random.Random) -> tuple[Image.Image, NDArray[np.uint8]]:
    """Draws two kinds of ground, one above the other, and up to three shapes on them.

    Returns:
        The image, and the label of each pixel, (height, width) uint8: 1 + the index of the class in `LABEL_NAMES`, or 0
        where a pixel shows several classes.
    """
    wide, high = width * _OVERSAMPLING, height * _OVERSAMPLING
    labels = _draw_grounds(wide, high, rng)
    colors = np.array([(0, 0, 0), *GROUNDS.values()], dtype=np.float32)[labels]
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 14, (height, width, 1)).astype(np.float32)
    shade = rng.uniform(0.85, 1.1)
    for _ in range(rng.randint(1, _MOST_SHAPES)):
        shape, name = rng.choice(SHAPES), rng.choice(list(COLORS))
        color = [min(255, rng.uniform(0.85, 1.1) * value) for value in COLORS[name]]
        radius = rng.uniform(0.14, 0.28) * min(wide, high)
        mask = Image.new("L", (wide, high), 0)
        place = rng.uniform(radius, wide - radius), rng.uniform(radius, high - radius)
        draw_shape(ImageDraw.Draw(mask), shape, *place, radius, (255,))
        inside = np.asarray(mask) > 0
        labels[inside], colors[inside] = 1 + LABEL_NAMES.index(name), color
    cells = labels.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING)
    first = cells[:, :1, :, :1]
    is_pure = (cells == first).all((1, 3))
    pixels = colors.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 3).mean((1, 3)) * shade + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), np.where(is_pure, first[:, 0, :, 0], 0).astype(
        np.uint8
    )


def _draw_grounds(wide: int, high: int, rng: random.Random) -> NDArray[np.uint8]:
    """Returns the label of each pixel, (high, wide) uint8, for two kinds of ground with a wavy border."""
    above, below = rng.sample(range(1, len(GROUNDS) + 1), 2)
    column = np.arange(wide) / wide
    wave = rng.uniform(0.02, 0.1) * np.sin(2 * np.pi * (rng.uniform(0.5, 2) * column + rng.random()))
    border = (rng.uniform(0.3, 0.7) + wave) * high
    return np.where(np.arange(high)[:, None] < border, above, below).astype(np.uint8)
