"""Draws the boxes, masks and names of objects on an image."""

# N objects.

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

_OPACITY = 0.45
_GOLDEN = 0.618034  # neighbouring labels get hues that are far apart
_TEXT_SHARE, _LEAST_TEXT, _LARGEST_TEXT = 1 / 28, 9, 22  # of the shorter side; pixels


class DrawnObject(NamedTuple):
    """Describes an object to draw on an image."""

    box: Sequence[float]
    """Left, top, width and height in pixels."""
    label: int
    """Category label, which determines the color."""
    text: str
    """Text beside the box, such as a category name and a score."""
    mask: NDArray[np.bool_] | None = None
    """Mask of the object, (height, width) bool, of the image's size; None draws only the box."""


def label_color(label: int) -> tuple[int, int, int]:
    """Returns the RGB color of a label; labels with consecutive numbers have clearly different colors."""
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * _GOLDEN) % 1, 0.85, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_objects(image: Image.Image, objects: Sequence[DrawnObject]) -> Image.Image:
    """Returns a copy of an RGB image with objects drawn on it; earlier objects are drawn over later ones."""
    pixels = np.array(image.convert("RGB"), dtype=np.float32)
    for found in reversed(objects):
        if found.mask is not None:
            color = np.array(label_color(found.label), dtype=np.float32)
            pixels[found.mask] = (1 - _OPACITY) * pixels[found.mask] + _OPACITY * color
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    draw, side = ImageDraw.Draw(picture), min(picture.size)
    font = ImageFont.load_default(size=min(max(_LEAST_TEXT, side * _TEXT_SHARE), _LARGEST_TEXT))
    width = max(1, round(side / 250))
    for found in reversed(objects):
        left, top, box_width, box_height = found.box
        corners = (left, top, max(left, left + box_width - 1), max(top, top + box_height - 1))
        draw.rectangle(corners, outline=label_color(found.label), width=width)
        _write(draw, found, font, picture.size)
    return picture


def _write(
    draw: ImageDraw.ImageDraw,
    found: DrawnObject,
    font: "ImageFont.FreeTypeFont | ImageFont.ImageFont",
    size: tuple[int, int],
) -> None:
    """Writes the text of an object above its box, or inside the box if there is no room above."""
    if not found.text:
        return
    left, top = found.box[:2]
    _, _, right, bottom = draw.textbbox((0, 0), found.text, font=font)
    x = min(max(0.0, left), max(0.0, size[0] - right - 2))
    y = top - bottom - 2 if top - bottom - 2 >= 0 else max(0.0, top)
    red, green, blue = label_color(found.label)
    draw.rectangle((x, y, x + right + 2, y + bottom + 2), fill=(red, green, blue))
    is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.text((x + 1, y), found.text, fill="black" if is_bright else "white", font=font)
