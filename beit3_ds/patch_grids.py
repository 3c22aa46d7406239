"""Orders the patches of images window by window, so that each attention window is one range of rows.

Each image is a grid of patches; the grid may have any height and width. The grid is divided into square windows from
its top left corner. All full windows come first, in row-major order. They are followed by the cut-off windows: first
those at the right edge, then those at the bottom edge, then the one in the corner. Within a window, patches are in
row-major order. Windows contain no padding.
"""

# T patches of all images.

from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.device_copy import copy_to_device

Grid = tuple[int, int]
"""Height and width of an image's patch grid, in patches."""
Grids = tuple[Grid, ...]
"""Height and width of each image's patch grid, in patches."""


class Window(NamedTuple):
    """Describes a rectangle of patches in one image's patch grid."""

    top: int
    """First row of the rectangle."""
    left: int
    """First column of the rectangle."""
    height: int
    """Number of rows."""
    width: int
    """Number of columns."""


class PatchPlaces(NamedTuple):
    """Holds the image index, the grid row and the grid column of each patch, window by window."""

    image_T: Tensor
    """Index of each patch's image, int64."""
    row_T: Tensor
    """Row of each patch in the grid of the patch's image, int64."""
    column_T: Tensor
    """Column of each patch in the grid of the patch's image, int64."""


def image_windows(grid: Grid, window_size: int) -> list[Window]:
    """Divides a patch grid into windows: first the full ones, then those cut off by the right or bottom edge.

    Args:
        grid: height and width of the grid.
        window_size: side of a window in patches; 0 returns one window for the whole image.
    """
    height, width = grid
    if not window_size:
        return [Window(0, 0, height, width)]
    bottom, right = height - height % window_size, width - width % window_size
    tops, lefts = range(0, bottom, window_size), range(0, right, window_size)
    windows = [Window(top, left, window_size, window_size) for top in tops for left in lefts]
    windows += [Window(top, right, window_size, width - right) for top in tops]
    windows += [Window(bottom, left, height - bottom, window_size) for left in lefts]
    windows.append(Window(bottom, right, height - bottom, width - right))
    return [window for window in windows if window.height * window.width]


@lru_cache(maxsize=64)
def window_ranges(grids: Grids, window_size: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    """Returns the range [start, stop) of packed rows of each window, image by image.

    Each patch is one packed row, in the order of `patch_places`. The result has the form of
    `SequenceLayout.sequence_ranges`, with one range per window.

    Args:
        grids: height and width of each image's patch grid.
        window_size: side of a window in patches; 0 returns one range per image.
    """
    sizes = [window.height * window.width for grid in grids for window in image_windows(grid, window_size)]
    return tuple((borders,) for borders in pairwise(accumulate(sizes, initial=0)))


@lru_cache(maxsize=16)  # equal for all layers of a micro-batch
def patch_places(grids: Grids, window_size: int, device: torch.device) -> PatchPlaces:
    """Returns the image index, grid row and grid column of each patch, ordered by image and window.

    The result is on the device `device`.
    """
    parts = [
        _window_places(image, window) for image, grid in enumerate(grids) for window in image_windows(grid, window_size)
    ]
    places = torch.cat(parts, dim=1) if parts else torch.empty(3, 0, dtype=torch.int64)
    return PatchPlaces(*copy_to_device(places, device).unbind())


def canvas_grid(grids: Iterable[Grid]) -> Grid:
    """Returns the smallest grid that contains all grids; (1, 1) if there are none."""
    grids = [(1, 1), *grids]
    return max(height for height, _ in grids), max(width for _, width in grids)


def _window_places(image: int, window: Window) -> Tensor:
    rows = torch.arange(window.top, window.top + window.height).repeat_interleave(window.width)
    columns = torch.arange(window.left, window.left + window.width).repeat(window.height)
    return torch.stack([torch.full_like(rows, image), rows, columns])
