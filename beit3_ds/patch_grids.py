"""Orders the patches of images window by window, so that every attention window is one range of rows.

An image is a grid of patches of any height and width. It is cut into square windows from its top left corner: first all
whole windows in row order, then the narrower windows at the right edge, the lower windows at the bottom edge, and the
window in the corner. Inside a window the patches are in row order. Windows at the border contain real patches only.
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
"""Number of patches of an image per column and per row: the height and the width of its grid."""
Grids = tuple[Grid, ...]
"""Grid of each image."""


class Window(NamedTuple):
    """Describes a rectangle of patches of one image."""

    top: int
    """First row of the grid."""
    left: int
    """First column of the grid."""
    height: int
    """Number of rows."""
    width: int
    """Number of columns."""


class PatchPlaces(NamedTuple):
    """Holds the place of every patch of a stream, in the order of the stream."""

    image_T: Tensor
    """Number of the patch's image, int64."""
    row_T: Tensor
    """Row of the patch in the grid of its image, int64."""
    column_T: Tensor
    """Column of the patch in the grid of its image, int64."""


def image_windows(grid: Grid, window_size: int) -> list[Window]:
    """Cuts a grid into windows, in the order in which their patches follow each other.

    Args:
        grid: height and width of the grid.
        window_size: patches on a side of a window; 0 makes the whole image one window.
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
    """Returns the row range [start, stop) of each window of each image, as `SequenceLayout.sequence_ranges` does.

    Args:
        grids: grid of each image.
        window_size: patches on a side of a window; 0 returns one range per image.
    """
    sizes = [window.height * window.width for grid in grids for window in image_windows(grid, window_size)]
    return tuple((borders,) for borders in pairwise(accumulate(sizes, initial=0)))


@lru_cache(maxsize=16)  # the same for all layers of a micro-batch
def patch_places(grids: Grids, window_size: int, device: torch.device) -> PatchPlaces:
    """Returns the place of every patch, in window order, on `device`."""
    parts = [
        _window_places(image, window) for image, grid in enumerate(grids) for window in image_windows(grid, window_size)
    ]
    places = torch.cat(parts, dim=1) if parts else torch.empty(3, 0, dtype=torch.int64)
    return PatchPlaces(*copy_to_device(places, device).unbind())


def canvas_grid(grids: Iterable[Grid]) -> Grid:
    """Returns the smallest grid that contains all `grids`; (1, 1) without grids."""
    grids = [(1, 1), *grids]
    return max(height for height, _ in grids), max(width for _, width in grids)


def _window_places(image: int, window: Window) -> Tensor:
    rows = torch.arange(window.top, window.top + window.height).repeat_interleave(window.width)
    columns = torch.arange(window.left, window.left + window.width).repeat(window.height)
    return torch.stack([torch.full_like(rows, image), rows, columns])
