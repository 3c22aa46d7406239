"""Image bytes to RGB pixels."""

import io

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Pixels that an image may have: Pillow's own limit against decompression bombs, a quarter GiB decoded."""


def decode_image(data: bytes) -> Image.Image:
    """Decodes an image file upright and in RGB; transparent parts become white, of an animation the first frame.

    Raises:
        ValueError: for bytes that are not a whole image, too many pixels, or a pixel format without a known white.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:  # before the pixels are decoded; Pillow only warns up to twice as many
                raise ValueError(f"{width} x {height} pixels exceed the limit of {MAX_PIXELS}")
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise nearly anything on corrupt bytes, SyntaxError and struct.error included
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255 instead of scaling, which turns nearly all of the image white.
        grey = np.asarray(image).astype(np.uint32) * 255 // 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say which value is white")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
