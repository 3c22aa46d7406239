"""Converts uint8 images to floats for the model, on any device.

Images are sent between processes and to the device as uint8, which takes a quarter of the bytes of float32. The
operations are elementwise. On the CPU, an image's result is bitwise equal in any batch.
"""

# B images, S pixels on a side.

from torch import Tensor


def to_floats(pixels_B3SS: Tensor, colors_B33: Tensor | None = None) -> Tensor:
    """Returns uint8 images as float32 in [-1, 1], (images, 3, size, size). Returns float images unchanged.

    Args:
        pixels_B3SS: RGB images, (images, 3, size, size): uint8, or floats in [-1, 1].
        colors_B33: colour changes for uint8 images (`change_colors`), ignored for float images; None changes nothing.
    """
    if pixels_B3SS.is_floating_point():
        return pixels_B3SS
    values = pixels_B3SS.float()
    return (values if colors_B33 is None else change_colors(values, colors_B33)).div_(127.5).sub_(1)


def change_colors(values_B3SS: Tensor, colors_B33: Tensor) -> Tensor:
    """Applies three colour changes to each image in place, and returns the same tensor.

    A change maps a value x of a pixel with grey value g to factor * x + weight * g + offset, clamped to [0, 255].

    Args:
        values_B3SS: RGB images, float32 in [0, 255].
        colors_B33: three changes per image, (images, 3, 3) float32; each change is (factor, weight, offset).
    """
    for change_B3 in colors_B33.unbind(1):
        factor_B1, weight_B1, offset_B1 = change_B3.view(-1, 3, 1, 1, 1).unbind(1)
        other_B1SS = (grey(values_B3SS) * weight_B1[:, 0] + offset_B1[:, 0]).unsqueeze(1)
        values_B3SS.mul_(factor_B1).add_(other_B1SS).clamp_(0, 255)
    return values_B3SS


def grey(values_B3SS: Tensor) -> Tensor:
    """Returns the grey values of RGB images, (images, size, size), with the ITU-R 601 luma weights that Pillow uses."""
    red_BSS, green_BSS, blue_BSS = values_B3SS.unbind(1)
    return (red_BSS * 0.299).add_(green_BSS, alpha=0.587).add_(blue_BSS, alpha=0.114)
