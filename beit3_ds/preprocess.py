"""Preprocesses an image for a model exactly as validation images are preprocessed during training."""

from pathlib import Path

from PIL import Image
from torch import Tensor

from beit3_ds.data.images.augmentation import center_pixels, normalize
from beit3_ds.data.images.decoding import MAX_IMAGE_BYTES, decode_image, upright_rgb
from beit3_ds.data.images.one_view import whole_view
from beit3_ds.regular_file import read_regular


def preprocess(image: str | Path | bytes | Image.Image, image_size: int, *, crop: bool = True) -> Tensor:
    """Converts an image to the pixels that `BEiT3.encode` expects, exactly as for validation images.

    Applies the EXIF orientation and converts to RGB: transparent parts become white, and 16-bit values are scaled to 8
    bits. Then crops the largest centred square, resizes it bicubically with antialiasing, and normalizes with mean 0.5
    and standard deviation 0.5.

    Args:
        image: path of an image file, its bytes, or an opened Pillow image.
        image_size: side of the result in pixels, `model.config.image_size`.
        crop: whether to crop to a square, as in pretraining. False resizes the whole image to a square, as ImageNet
            classification and the vision-language tasks do.

    Returns:
        Pixels, (3, image_size, image_size) float32 in [-1, 1]. `torch.stack` joins several to a batch.

    Raises:
        OSError: if the file cannot be read, is a pipe or a device, or has more than 256 MiB.
        TypeError: if `image` has another type.
        ValueError: if the image is not a complete JPEG, PNG, WebP, GIF, BMP or TIFF image or has no pixels, or if
            `image_size` is not positive.
    """
    if not isinstance(image_size, int) or isinstance(image_size, bool) or image_size < 1:
        raise ValueError(f"image_size={image_size!r} is not a number of pixels. Pass model.config.image_size.")
    return (_center_view if crop else whole_view)(open_image(image), image_size)


def open_image(image: str | Path | bytes | Image.Image) -> Image.Image:
    """Decodes an image upright and in RGB. Transparent parts become white, and 16-bit values are scaled to 8 bits.

    Args:
        image: path of an image file, its bytes, or an opened Pillow image.

    Raises:
        OSError: if the file cannot be read, is a pipe or a device, or has more than 256 MiB.
        TypeError: if `image` has another type.
        ValueError: if the image is not a complete JPEG, PNG, WebP, GIF, BMP or TIFF image, or has no pixels.
    """
    if isinstance(image, Image.Image):
        if not all(image.size):
            raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
        return upright_rgb(image)
    if isinstance(image, bytes):
        return decode_image(image)
    if not isinstance(image, str | Path):
        raise TypeError(
            f"image is a {type(image).__name__}. Pass the path of an image file, its bytes, or a PIL.Image.Image."
        )
    try:
        return decode_image(read_regular(image, MAX_IMAGE_BYTES))
    except ValueError as error:
        raise ValueError(f"{image}: {error}") from error


def _center_view(image: Image.Image, image_size: int) -> Tensor:
    return normalize(center_pixels(image, image_size).float())
