"""Encodes label maps as PNG, and draws label maps in colours with a legend."""

import colorsys
import io
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from beit3_ds.tasks.segmentation.config import IGNORED

_GOLDEN = 0.618034  # golden ratio: neighbouring classes get very different hues
_UNKNOWN = (0, 0, 0)
_SHARE = 0.8  # opacity of the class colour over the image
_ROW, _SWATCH, _MARGIN = 20, 14, 6  # pixels of the legend


def class_color(label: int) -> tuple[int, int, int]:
    """Returns the RGB colour of a class; neighbouring class indices have clearly different colours."""
    if label == IGNORED:
        return _UNKNOWN
    bright = (0.95, 0.7, 0.5)[label % 3]
    red, green, blue = colorsys.hsv_to_rgb((0.02 + label * _GOLDEN) % 1, (0.85, 0.6)[label % 2], bright)
    return round(255 * red), round(255 * green), round(255 * blue)


def encode_label_map(labels: Tensor) -> Tensor:
    """Encodes predicted classes as a PNG in ADE20K's format; returns the bytes of the PNG, (bytes,) uint8.

    A pixel of the PNG is one byte with the value class + 1.

    Args:
        labels: class of each pixel, (height, width) uint8, below `IGNORED`.
    """
    buffer = io.BytesIO()
    Image.fromarray((labels.numpy() + np.uint8(1)).astype(np.uint8)).save(buffer, format="PNG")
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def draw_labels(image: Image.Image, labels: NDArray[np.uint8], names: Sequence[str]) -> Image.Image:
    """Draws classes in colours over an image; a legend on the right names the classes in the image.

    Args:
        image: RGB image.
        labels: class of each pixel, (height, width) uint8; 255 where unknown, drawn dark.
        names: name of each class.
    """
    colored = color_labels(image, labels)
    present = [label for label in np.unique(labels).tolist() if label != IGNORED]
    share = np.bincount(labels.ravel(), minlength=IGNORED + 1) / max(1, labels.size)
    entries = [
        (label, f"{names[label]} {_percent(share[label])}") for label in sorted(present, key=lambda x: -share[x])
    ]
    font = ImageFont.load_default(_SWATCH)
    width = max((int(font.getlength(text)) for _, text in entries), default=0) + _SWATCH + 3 * _MARGIN
    height = max(image.height, len(entries) * _ROW + 2 * _MARGIN)
    page = Image.new("RGB", (image.width + width, height), "white")
    page.paste(colored, (0, 0))
    draw = ImageDraw.Draw(page)
    for row, (label, text) in enumerate(entries):
        left, top = image.width + _MARGIN, _MARGIN + row * _ROW
        draw.rectangle((left, top, left + _SWATCH, top + _SWATCH), fill=class_color(label))
        draw.text((left + _SWATCH + _MARGIN, top - 1), text, fill="black", font=font)
    return page


def _percent(share: float) -> str:
    return "<1%" if share < 0.005 else f"{share:.0%}"


def color_labels(image: Image.Image, labels: NDArray[np.uint8]) -> Image.Image:
    """Draws classes in colours over an image; pixels without a class become dark.

    Args:
        image: RGB image.
        labels: class of each pixel, (height, width) uint8; 255 where unknown.
    """
    palette = np.array([class_color(label) for label in range(IGNORED + 1)], dtype=np.float32)
    own = np.asarray(image.convert("RGB"), dtype=np.float32)
    mixed = _SHARE * palette[labels] + (1 - _SHARE) * own
    return Image.fromarray(mixed.round().astype(np.uint8))
