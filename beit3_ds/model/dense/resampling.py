"""Resamples the tensors of a model that depend on the sizes of images, patches and windows."""

# S places per side of a grid of positions, D hidden, P pixels per side of a patch, K head width.

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import ModelConfig
from beit3_ds.model.dense.embeddings import resample_table
from beit3_ds.model.dense.relative_positions import covered_extent, resample_distances
from beit3_ds.positions import interpolate_positions

PATCH_WEIGHT = "embeddings.patch.weight"
"""Name of the kernel of the patch projection, whose shape depends on `patch_size`."""


def resample_positions(table: Tensor, stored: ModelConfig, model: ModelConfig) -> Tensor:
    """Resamples a table of image positions bicubically; a model with `dense` has no row for CLS.

    Args:
        table: rows of CLS and of S * S patches, or of the patches alone, (rows, D).
        stored: configuration of the model to which the table belongs.
        model: configuration of the model that needs another table.
    """
    is_same_grid = stored.grid_size == model.grid_size
    if model.dense is None:
        return table if is_same_grid else interpolate_positions(table[None], model.grid_size)[0]
    patches = table if stored.dense is not None else table[1:]
    if is_same_grid:
        return patches
    return resample_table(patches.float(), model.grid_size).to(table.dtype)


def resample_patch_weight(weight: Tensor, patch_size: int) -> Tensor:
    """Resamples the kernel of the patch projection, (D, 3, P, P), to patches of another size.

    A patch and its bicubically resampled copy have equal embeddings if the resampling loses nothing: the new kernel is
    the pseudo-inverse of the transposed resampling matrix times the old kernel (Beyer et al., 2023, FlexiViT,
    arXiv:2212.08013, section 3.4). A bicubically resampled kernel would change both scale and direction.
    """
    old = weight.shape[-1]
    if old == patch_size:
        return weight
    pixels = torch.eye(old * old, dtype=torch.float64).view(old * old, 1, old, old)
    size = (patch_size, patch_size)
    resized = F.interpolate(pixels, size, mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resized.flatten(1))  # (P' * P', P * P)
    flat = weight.double().flatten(2) @ inverse.T
    return flat.unflatten(2, size).to(weight.dtype)


def resample_relative_positions(table: Tensor, model: ModelConfig, layer: int) -> Tensor:
    """Resamples a block's table of relative positions, (distances, K), linearly to the extent of its windows or image.

    Args:
        table: the table.
        model: configuration of the model that needs the table.
        layer: index of the block, from 0.
    """
    extent = covered_extent(model, layer)
    if len(table) == 2 * extent - 1:
        return table
    return resample_distances(table.float(), extent).to(table.dtype)
