"""Adds decomposed relative positions to attention scores by widening queries and keys, without a bias tensor."""

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
"""Head widths that are multiples of this number let GPUs load 128 bits at once in half precision."""


class RelativePositions(nn.Module):
    """Widens queries and keys so that their products include decomposed relative positions.

    For a query q at row i and column j, and a key k at row m and column n, the score is q @ k / sqrt(K) + q @ rows[i -
    m] + q @ columns[j - n] (MViTv2: Li et al., 2021, arXiv:2112.01526, section 4.1). Here, K is the width of q and k.
    The last two products are not scaled, as in ViTDet and SAM.

    The wide query has three parts: q, the products of q with the entries of `rows` for all m, and the products of q
    with the entries of `columns` for all n. The wide key has k, the one-hot vector of m, and the one-hot vector of n.
    Attention kernels divide the product of a wide query and a wide key by the square root of their width W. The parts
    of the wide query are scaled so that the result is the score above. So any attention kernel can compute the score.

    All heads share the tables `rows` and `columns`. The model's initialization sets both to zero. For images larger
    than the tables, the tables are resampled linearly. The backward pass all-reduces the tables' gradients over the
    tensor-parallel ranks, because each rank has different heads.
    """

    def __init__(self, side: int, head_size: int, tensor: TensorParallel) -> None:
        """Builds the two tables, uninitialized.

        Args:
            side: side of the window or image that the tables cover, in patches (S).
            head_size: width of a head (K).
            tensor: the tensor-parallel group, which splits the heads.
        """
        super().__init__()
        self.side, self.tensor = side, tensor
        self.rows = nn.Parameter(torch.empty(2 * side - 1, head_size))
        self.columns = nn.Parameter(torch.empty(2 * side - 1, head_size))

    def forward(
        self, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, grids: Grids, row_window_size: int, window_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values that are widened from K to W columns per head, (T, H, W) each.

        Attention with these tensors includes the relative positions. Only the first K columns of its output are
        meaningful.

        Args:
            q_THK: queries.
            k_THK: keys.
            v_THK: values.
            grids: numbers of rows and columns of each image's patch grid.
            row_window_size: side, in patches, of the windows that determine the order of the T rows
                (`ModelConfig.dense.window_size`). This order is the same in all layers.
            window_size: side, in patches, of the windows in which this layer attends; 0 if the layer attends to whole
                images.
        """
        rows, columns = (
            _axis_places(grids, row_window_size, window_size, self.side, axis, q_THK.device) for axis in range(2)
        )
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
        """Returns the products of each query with its table entries, (T, H, J).

        A query has one table entry for each row and one for each column of the largest window or image. In a smaller
        window or image, some of these rows and columns have no keys. Table entries for such rows and columns have
        products too, which are unused. Along J, the products for rows come before the products for columns.
        """
        tables: list[Tensor] = []
        entries: list[Tensor] = []
        # One autograd node computes both gradients, because ZeRO-2 adds up gradients in the order in which each rank
        # computes them. With two nodes, this order would depend on whether images are larger than a table.
        both = self.tensor.copy_to(torch.stack((self.rows, self.columns))).unbind()
        for own, places in zip(both, axes, strict=True):
            entries.append(places.entries_TA + sum(map(len, tables)))
            tables += [own, *(resample_distances(own, side) for side in places.larger)]
        products_RL = q_THK.flatten(0, 1) @ torch.cat(tables).T  # R = T * H
        products_THL = products_RL.unflatten(0, q_THK.shape[:2])
        picked: Tensor = _Pick.apply(products_THL, torch.cat(entries, 1))
        return picked


class _Pick(torch.autograd.Function):
    """Selects columns of each row; unlike `gather`, it does not save the input for the backward pass."""

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
    """Returns W, the width of one head after its queries and keys are widened for relative positions.

    Args:
        head_size: width K of one head without relative positions.
        extents: rows and columns of the largest window or image, in patches.
    """
    return -(-(head_size + sum(extents)) // _ALIGNMENT) * _ALIGNMENT


def covered_extent(config: ModelConfig, layer: int) -> int:
    """Returns the side of the area that the relative positions of block `layer` (from 0) cover, in patches.

    The area is a window, or the whole image if the block has no windows.
    """
    return config.block_window(layer) or config.grid_size


def resample_distances(table_LK: Tensor, side: int) -> Tensor:
    """Resamples a table of relative positions linearly, from L to 2 * side - 1 rows, as ViTDet and SAM do."""
    weights = _resampling_weights(len(table_LK), 2 * side - 1)
    return weights.to(table_LK, non_blocking=True) @ table_LK


class _AxisPlaces(NamedTuple):
    """Holds the positions of patches along one axis (rows or columns) as table indices and one-hot vectors."""

    entries_TA: Tensor
    """Row numbers in the concatenated tables, (T, A) int64. A patch and a position of its window or image have a
    distance along the axis. Entry [t, a] is the row for the distance of patch t from position a.

    The trained table comes first. One resampled copy for each side length in `larger` follows, in the order of
    `larger`. If the side length of the patch's window or image is in `larger`, the entry is a row of the copy for this
    length. In all other cases, the entry is a row of the trained table.
    """
    one_hot_TA: Tensor
    """Each patch's position in its window or image, along the axis, as a one-hot vector, (T, A) bool."""
    larger: tuple[int, ...]
    """Side lengths of images along the axis, in patches, ascending and without repetition. Only lengths above
    `RelativePositions.side` are listed. The trained table is resampled once for each of them."""


@lru_cache(maxsize=32)  # equal for all layers with the same window size
def _axis_places(
    grids: Grids, row_window_size: int, window_size: int, side: int, axis: int, device: torch.device
) -> _AxisPlaces:
    places = patch_places(grids, row_window_size, torch.device("cpu"))
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
    # Positions outside of a patch's image get an index too, but there are no keys at these positions.
    distances_TA = (place_T[:, None] - numbers_A).clamp(-middle_T1, middle_T1)
    entries_TA = start_B[places.image_T, None] + middle_T1 + distances_TA
    one_hot_TA = place_T[:, None] == numbers_A
    return _AxisPlaces(copy_to_device(entries_TA, device), copy_to_device(one_hot_TA, device), larger)


@lru_cache(maxsize=32)
def _resampling_weights(old: int, new: int) -> Tensor:
    """Returns the float64 matrix (new, old) that resamples a table linearly."""
    return F.interpolate(torch.eye(old, dtype=torch.float64)[None], new, mode="linear", align_corners=False)[
        0
    ].T.contiguous()
