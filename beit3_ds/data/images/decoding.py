"""Decodes image files to RGB pixels."""

import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 89_478_485
"""Maximum pixels of an image: Pillow's limit against decompression bombs, 256 MiB of decoded RGB."""
MAX_IMAGE_BYTES = 1 << 28
"""Maximum size of an image file in bytes. An RGB image with `MAX_PIXELS` pixels has this size without compression."""
MAX_DECODING_BYTES = 300_000_000
"""Maximum memory in bytes for decoding one image, including the file and all copies of the pixels."""
_STRIP_PIXELS = 1 << 20
_MAX_JPEG_SCANS = 100  # progressive files have about ten; each scan takes a pass over all pixels
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
# The content determines the format, not the extension. Other plugins of Pillow start programs or read vector graphics.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_image(data: bytes, min_side: int | None = None) -> Image.Image:
    """Decodes an image file to upright RGB pixels.

    Transparent parts become white. Only the first frame of an animation is decoded. An image with damaged EXIF data is
    not rotated.

    Args:
        data: content of the file.
        min_side: minimum pixels of the shorter side after decoding. A large JPEG is decoded at a half, a quarter or an
            eighth of its size, if its shorter side still has `min_side` pixels. None decodes all pixels.

    Raises:
        ValueError: if the bytes are not a complete JPEG, PNG, WebP, GIF, BMP or TIFF image, if the file or image is too
            large, or if the pixel format does not define white (Pillow's modes I and F).
    """
    if not data:
        raise ValueError("empty file")
    if len(data) > MAX_IMAGE_BYTES:
        raise ValueError(f"{len(data)} bytes exceed the limit of {MAX_IMAGE_BYTES}")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Checked before decoding, because Pillow only warns about up to twice its limit.
            if not 0 < math.prod(image.size) <= MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are none or exceed the limit of {MAX_PIXELS}")
            if image.format in ("JPEG", "MPO") and data.count(b"\xff\xda") > _MAX_JPEG_SCANS:
                raise ValueError(f"more than {_MAX_JPEG_SCANS} scans in a JPEG")
            size = image.size
            if min_side is not None:
                image.draft(None, (min_side, min_side))  # has no effect on other formats
            if (needed := len(data) + _decoding_bytes(image, size)) > MAX_DECODING_BYTES:
                raise ValueError(
                    f"decoding {image.width} x {image.height} pixels of mode {image.mode} takes {needed} bytes, more "
                    f"than the limit of {MAX_DECODING_BYTES}"
                )
            image.load()
            return upright_rgb(image)
    except UnidentifiedImageError:  # its message is the address of the buffer
        raise ValueError(f"cannot identify the image: none of {', '.join(_FORMATS)}") from None
    except Exception as error:  # decoders raise nearly anything on corrupt bytes, such as SyntaxError
        raise ValueError(f"{type(error).__name__}: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Rotates an open image upright by its EXIF orientation, and converts it to RGB on a white background.

    Raises:
        ValueError: if the pixel format does not define white (Pillow's modes I and F).
    """
    orientation, rgb = _orientation(image), _to_rgb(image)
    if isinstance(orientation, int) and orientation in _UPRIGHT:
        return rgb.transpose(_UPRIGHT[orientation])
    return rgb.copy() if rgb is image else rgb  # a copy, because the lazy image closes with the `with` block


def _decoding_bytes(image: Image.Image, size: tuple[int, int]) -> int:
    """Returns the maximum memory in bytes for decoding an image, without the bytes of the file.

    The numbers of bytes per pixel were measured with Pillow.

    Args:
        image: an open image that is not decoded yet.
        size: width and height in the file. The attribute `image.size` is smaller if the image will be decoded at a
            reduced size.
    """
    pixels = math.prod(image.size)
    if image.format == "WEBP":
        return 18 * pixels
    if image.info.get("progressive"):  # the coefficients of all pixels, and the decoded ones
        return max(6 * math.prod(size) + 4 * pixels, 8 * pixels)
    return (8 if image.mode == "RGB" else 12) * pixels


def _orientation(image: Image.Image) -> object:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # EXIF data raise nearly anything too, while the pixels are valid
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image to RGB. Converts in strips if the conversion makes several copies of the pixels."""
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} does not say which value is white")
    if not image.mode.startswith("I;16") and not image.has_transparency_data:
        return image.convert("RGB")
    rgb, rows = Image.new("RGB", image.size), max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        rgb.paste(_strip_to_rgb(strip), (0, top))
    return rgb


def _strip_to_rgb(strip: Image.Image) -> Image.Image:
    if strip.mode.startswith("I;16"):
        # Pillow's conversion clips at 255 instead of scaling, so nearly the whole image would become white.
        grey = np.asarray(strip).astype(np.uint32) * 255 // 65535
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    layer = strip.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
