"""Resamples the tensors whose shape depends on the sizes of images, patches or windows."""

# S places per side of a grid of positions, D hidden, P pixels per side of a patch, K head width.

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import ModelConfig
from beit3_ds.model.dense.embeddings import resample_table
from beit3_ds.model.dense.relative_positions import covered_extent, resample_distances
from beit3_ds.positions import interpolate_positions

PATCH_WEIGHT = "embeddings.patch.weight"
"""Name of the patch projection's weight. The shape of this weight depends on `patch_size`."""


def resample_positions(table: Tensor, stored: ModelConfig, model: ModelConfig) -> Tensor:
    """Resamples a table of image positions bicubically to the patch grid of another model.

    If the table's model has a CLS token, the first row is the position of this token. The result lacks this row if
    `model` sets `dense`, because a model with `dense` has no CLS token.

    Args:
        table: position table, (1 + S * S, D), or (S * S, D) if `stored` sets `dense`.
        stored: configuration of the table's model. If it sets `dense`, `model` must set `dense` too.
        model: configuration of the other model.
    """
    is_same_grid = stored.grid_size == model.grid_size
    if model.dense is None:
        return table if is_same_grid else interpolate_positions(table[None], model.grid_size)[0]
    patches = table if stored.dense is not None else table[1:]
    if is_same_grid:
        return patches
    return resample_table(patches.float(), model.grid_size).to(table.dtype)


def resample_patch_weight(weight: Tensor, patch_size: int) -> Tensor:
    """Resamples the patch projection kernel, (D, 3, P, P), to another patch size.

    The new kernel is the old kernel times the pseudo-inverse of the transposed matrix of bicubic resampling (FlexiViT:
    Beyer et al., 2023, arXiv:2212.08013, section 3.4). With the new kernel, a resized patch keeps its embedding, except
    for details that resizing loses. Resampling the kernel bicubically would change scale and direction of the
    embeddings.
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
    """Resamples a block's table of relative positions, (distances, K), linearly to the block's window or image size.

    Args:
        table: table to resample.
        model: configuration that gives the new size.
        layer: index of the block, from 0.
    """
    extent = covered_extent(model, layer)
    if len(table) == 2 * extent - 1:
        return table
    return resample_distances(table.float(), extent).to(table.dtype)
