"""Resamples position embeddings of image patches to another grid size."""

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_positions(positions: Tensor, grid_size: int) -> Tensor:
    """Resamples a table of image positions bicubically to another number of patches.

    The result has shape (1, 1 + grid_size * grid_size, hidden size). The first row, the position of CLS, is unchanged.
    Computes in float32, and returns the dtype of `positions`. A table that already has the new size is returned
    unchanged.

    Args:
        positions: table for g patches along one side of an image, (1, 1 + g * g, hidden size).
        grid_size: new number of patches along one side.
    """
    old_size = grid_size_of(positions)
    if old_size == grid_size:
        return positions
    grid = positions[:, 1:].unflatten(1, (old_size, old_size)).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), (grid_size, grid_size), mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


def grid_size_of(positions: Tensor) -> int:
    """Returns g, the number of patches along one side of an image.

    Args:
        positions: table of image positions, (1, 1 + g * g, hidden size).
    """
    return round((positions.shape[1] - 1) ** 0.5)
