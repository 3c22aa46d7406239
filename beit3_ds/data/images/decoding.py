"""Image bytes to RGB pixels."""

import io
import math

import numpy as np
from PIL import Image

MAX_PIXELS = 89_478_485
"""Pixels that an image may have: Pillow's own limit against decompression bombs, a quarter GiB decoded."""
MAX_IMAGE_BYTES = 1 << 28
"""Bytes that an image file may have: as many as `MAX_PIXELS` take without compression."""
_MAX_JPEG_SCANS = 100  # progressive files have about ten; each one costs a pass over all pixels, however few its bytes
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Told by content, never by extension. Only these: other plugins of Pillow start programs or read vector graphics.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decodes an image file upright and in RGB; transparent parts become white, of an animation the first frame.

    An orientation that cannot be read from damaged EXIF data counts as upright.

    Args:
        data: the file.
        min_side: pixels on the shorter side that are enough. A JPEG with twice, four or eight times as many is decoded
            at a half, a quarter or an eighth of its size, straight from its frequencies. None decodes all pixels.

    Raises:
        ValueError: for bytes that are not a whole JPEG, PNG, WebP, GIF, BMP or TIFF image, too many bytes or pixels,
            or a pixel format without a known white.
    """
    if not data:
        raise ValueError("empty file")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{len(data)} bytes exceed the limit of {MAX_IMAGE_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Before the pixels are decoded; of too many pixels Pillow only warns up to twice its limit.
            if not 0 < math.prod(image.size) <= MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are none or exceed the limit of {MAX_PIXELS}")
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
                raise ValueError(f"more than {_MAX_JPEG_SCANS} scans in a JPEG")
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # does nothing to other formats
            image.load()
            return upright_rgb(image)
    except Exception as error:  # decoders raise nearly anything on corrupt bytes, SyntaxError and struct.error included
        raise ValueError(f"{type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Turns an open image upright by its EXIF orientation and converts it to RGB on white, as `decode_image` does.

    Raises:
        ValueError: for a pixel format without a known white.
    """
    return _upright(_to_rgb(image), _orientation(image))


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # as above; the pixels are sound
        return None


def _upright(image: Image.Image, orientation: object) -> Image.Image:
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        return image.transpose(_UPRIGHT[orientation])
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image.copy()  # a plain image: the file's own lazy object ends with the `with` block
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
