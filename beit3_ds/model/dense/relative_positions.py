"""Adds decomposed relative positions to the scores of attention, by wider queries and keys instead of a bias tensor."""

# T packed rows, H heads of this rank, K head width, A places along an axis of the largest window or image, J places
# along both axes, W = K + J rounded up to a multiple of 8, L = 2 S - 1 distances in a table, S its largest extent.

from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from beit3_ds.config import ModelConfig
from beit3_ds.device_copy import copy_to_device
from beit3_ds.parallel import TensorParallel
from beit3_ds.patch_grids import Grids, patch_places

_ALIGNMENT = 8
"""Multiple of the head width with which GPUs load 128 bits at once in half precision."""


class RelativePositions(nn.Module):
    """Widens queries and keys so that their products include decomposed relative positions.

    The score of a query at (i, j) and a key at (k, l) is q k / sqrt(K) + q rows[i - k] + q columns[j - l] (Li et al.,
    2021, MViTv2, arXiv:2112.01526, section 4.1; as in ViTDet and SAM, q is not scaled in the added products). Both sums
    are products with one-hot vectors of the key's row and column, so a wider query [q, q rows, q columns] and a wider
    key [k, one-hot row, one-hot column] give the same score without a bias tensor, in any attention kernel.

    All heads share both tables, whose values start at zero. An image larger than the table resamples it linearly. The
    backward pass all-reduces the gradients of both tables over the tensor-parallel ranks, which hold different heads.
    """

    def __init__(self, side: int, head_size: int, tensor: TensorParallel) -> None:
        """Builds the tables with uninitialised values.

        Args:
            side: patches on a side of the window or image that the tables cover, S.
            head_size: width of a head, K.
            tensor: the tensor-parallel group, which splits the heads.
        """
        super().__init__()
        self.side, self.tensor = side, tensor
        self.rows = nn.Parameter(torch.empty(2 * side - 1, head_size))
        self.columns = nn.Parameter(torch.empty(2 * side - 1, head_size))

    def forward(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, grids: Grids, order: int, window_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns wider queries, keys and values, (T, H, W) each; attention's output is in its first K columns.

        Args:
            q_THK: queries; k_THK and v_THK have the same shape.
            grids: grid of each image.
            order: window size by which the rows are ordered (`ModelConfig.dense.window_size`).
            window_size: window size of this layer; 0 if it attends to whole images.
        """
        rows, columns = (_axis_places(grids, order, window_size, self.side, axis, q_THK.device) for axis in range(2))
        products_THJ = self._products(q_THK, (rows, columns))
        one_hot_TJ = torch.cat([rows.one_hot_TA, columns.one_hot_TA], 1).to(q_THK.dtype)
        head_size, num_heads = q_THK.shape[2], q_THK.shape[1]
        extents = rows.one_hot_TA.shape[1], columns.one_hot_TA.shape[1]
        width = wide_head_size(head_size, extents)
        # packed_attention divides all products by sqrt(W).
        wide_q = torch.cat([q_THK * (width / head_size) ** 0.5, products_THJ * width**0.5], 2)
        wide_k = torch.cat([k_THK, one_hot_TJ[:, None].expand(-1, num_heads, -1)], 2)
        padding = (0, width - head_size - sum(extents))
        return F.pad(wide_q, padding), F.pad(wide_k, padding), F.pad(v_THK, (0, width - head_size))

    def _products(self, q_THK: Tensor, axes: tuple["_AxisPlaces", "_AxisPlaces"]) -> Tensor:
        """Returns the products of each query with its relative positions along both axes, (T, H, J)."""
        tables: list[Tensor] = []
        entries: list[Tensor] = []
        for table, places in zip((self.rows, self.columns), axes, strict=True):
            entries.append(places.entries_TA + sum(map(len, tables)))
            own = self.tensor.copy_to(table)
            tables += [own, *(resample_distances(own, side) for side in places.larger)]
        products_RL = q_THK.flatten(0, 1) @ torch.cat(tables).T  # R = T * H
        products_THL = products_RL.unflatten(0, q_THK.shape[:2])
        picked: Tensor = _Pick.apply(products_THL, torch.cat(entries, 1))
        return picked


class _Pick(torch.autograd.Function):
    """Picks some columns of each row; unlike `gather`, it saves no input."""

    @staticmethod
    def forward(ctx: Any, x_THL: Tensor, columns_TJ: Tensor) -> Tensor:
        ctx.shape = x_THL.shape
        ctx.save_for_backward(columns_TJ)
        return x_THL.gather(2, columns_TJ[:, None].expand(-1, x_THL.shape[1], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THJ: Tensor) -> tuple[Tensor, None]:
        (columns_TJ,) = ctx.saved_tensors
        columns_THJ = columns_TJ[:, None].expand_as(dy_THJ)
        return dy_THJ.new_zeros(ctx.shape).scatter_add_(2, columns_THJ, dy_THJ), None


def wide_head_size(head_size: int, extents: tuple[int, int]) -> int:
    """Returns the width W of the wider queries and keys, for windows or images of the given rows and columns."""
    return -(-(head_size + sum(extents)) // _ALIGNMENT) * _ALIGNMENT


def covered_extent(config: ModelConfig, layer: int) -> int:
    """Returns the patches on a side of the window or image that the tables of block `layer` (0-based) cover."""
    return config.block_window(layer) or config.grid_size


def resample_distances(table_LK: Tensor, side: int) -> Tensor:
    """Resamples a table of relative positions linearly, from L rows to 2 * side - 1 rows, as ViTDet and SAM do."""
    weights = _resampling_weights(len(table_LK), 2 * side - 1)
    return weights.to(table_LK, non_blocking=True) @ table_LK


class _AxisPlaces(NamedTuple):
    """Holds the relative places of patches along one axis, rows or columns; A is the largest extent."""

    entries_TA: Tensor
    """Entry, in the concatenated tables, of the distance from each patch to each place of its window, int64."""
    one_hot_TA: Tensor
    """One-hot vector of each patch's place in its window, bool."""
    larger: tuple[int, ...]
    """Extents of images for which the table is resampled, because they exceed it."""


@lru_cache(maxsize=32)  # the same for all layers of one kind
def _axis_places(grids: Grids, order: int, window_size: int, side: int, axis: int, device: torch.device) -> _AxisPlaces:
    places = patch_places(grids, order, torch.device("cpu"))
    place_T = (places.row_T, places.column_T)[axis]
    extents = [min(grid[axis], window_size or grid[axis]) for grid in grids]
    sides = [max(side, extent) for extent in extents]
    larger = tuple(sorted({extent for extent in sides if extent > side}))
    starts = dict(zip((side, *larger), accumulate((0, *(2 * each - 1 for each in (side, *larger)))), strict=False))
    if window_size:
        place_T = place_T % window_size
    side_B = torch.tensor(sides, dtype=torch.int64)
    start_B = torch.tensor([starts[each] for each in sides], dtype=torch.int64)
    numbers_A = torch.arange(max(extents, default=1))
    middle_T1 = (side_B - 1)[places.image_T, None]
    # Places beyond a patch's own image get an entry too, but no key is there.
    distances_TA = (place_T[:, None] - numbers_A).clamp(-middle_T1, middle_T1)
    entries_TA = start_B[places.image_T, None] + middle_T1 + distances_TA
    one_hot_TA = place_T[:, None] == numbers_A
    return _AxisPlaces(copy_to_device(entries_TA, device), copy_to_device(one_hot_TA, device), larger)


@lru_cache(maxsize=32)
def _resampling_weights(old: int, new: int) -> Tensor:
    """Returns the matrix (new, old) that resamples a table linearly, float64."""
    return F.interpolate(torch.eye(old, dtype=torch.float64)[None], new, mode="linear", align_corners=False)[
        0
    ].T.contiguous()
