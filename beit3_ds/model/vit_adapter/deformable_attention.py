"""Implements multi-scale deformable attention in plain PyTorch (Zhu et al., 2021, arXiv:2010.04159)."""

# B images, Q queries, S rows of all value maps, G value maps (levels), P points, D hidden, V value width of all heads,
# H heads, K value width of one head.

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.device_copy import copy_to_device

GridSize = tuple[int, int]
"""Rows and columns of a feature map."""


class DeformableAttention(nn.Module):
    """Attends from each query to a few sampling points around the query's own position in several feature maps.

    For each head, map (level) and point, a query predicts an offset (in cells of the map) and a weight. The weights of
    a head sum to 1. Values are interpolated bilinearly, and are zero outside the map. The batch may be empty. Does not
    communicate.
    """

    def __init__(self, hidden_size: int, value_size: int, num_heads: int, num_levels: int, num_points: int) -> None:
        """Builds the four linear layers.

        Args:
            hidden_size: width D of queries, map rows and outputs.
            value_size: total width V of the values of all heads; must be divisible by `num_heads`.
            num_heads: number of heads.
            num_levels: number of feature maps.
            num_points: number of sampling points per query, head and map.
        """
        super().__init__()
        assert value_size % num_heads == 0, f"{num_heads} heads do not divide {value_size} features"
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        self.sampling_offsets = nn.Linear(hidden_size, num_heads * num_levels * num_points * 2)
        self.attention_weights = nn.Linear(hidden_size, num_heads * num_levels * num_points)
        self.value_proj = nn.Linear(hidden_size, value_size)
        self.output_proj = nn.Linear(value_size, hidden_size)

    def forward(self, query_BQD: Tensor, places_Q2: Tensor, rows_BSD: Tensor, sizes: Sequence[GridSize]) -> Tensor:
        """Returns the attention output of each query, (B, Q, D).

        Args:
            query_BQD: queries.
            places_Q2: column and row of each query, as fractions of the image's width and height.
            rows_BSD: cells of all feature maps, in row-major order, one map after the other.
            sizes: rows and columns of each feature map.
        """
        shape = (self.num_heads, self.num_levels, self.num_points)
        values_BSHK = self.value_proj(rows_BSD).unflatten(2, (self.num_heads, -1))
        offsets_BQHGP2 = self.sampling_offsets(query_BQD).unflatten(2, (*shape, 2))
        weights_BQHX = self.attention_weights(query_BQD).unflatten(2, (self.num_heads, -1)).softmax(3)
        cells_G2 = copy_to_device(torch.tensor([[columns, rows] for rows, columns in sizes]), query_BQD.device)
        points_BQHGP2 = places_Q2[:, None, None, None] + offsets_BQHGP2 / cells_G2[:, None]
        sampled = sample_maps(values_BSHK, sizes, points_BQHGP2, weights_BQHX.unflatten(3, shape[1:]))
        return self.output_proj(sampled)


def sample_maps(values_BSHK: Tensor, sizes: Sequence[GridSize], points_BQHGP2: Tensor, weights_BQHGP: Tensor) -> Tensor:
    """Returns the weighted sum of the values at the sampling points of several feature maps, (B, Q, H * K).

    Args:
        values_BSHK: values of all feature maps, in row-major order, one map after the other.
        sizes: rows and columns of each feature map.
        points_BQHGP2: column and row of each point, as fractions of the map's width and height. A point may lie outside
            the map, where all values are 0.
        weights_BQHGP: weight of each point.
    """
    lengths = [rows * columns for rows, columns in sizes]
    grids = (2 * points_BQHGP2 - 1).transpose(1, 2).flatten(0, 1)  # (B * H, Q, G, P, 2), in [-1, 1]
    weights = weights_BQHGP.transpose(1, 2).flatten(0, 1)[:, None]  # (B * H, 1, Q, G, P)
    total = None
    for level, (size, values) in enumerate(zip(sizes, values_BSHK.split(lengths, dim=1), strict=True)):
        maps = values.permute(0, 2, 3, 1).flatten(0, 1).unflatten(2, size)  # (B * H, K, rows, columns)
        # Samples in the dtype of the points, because bf16 would round them to 8 bits.
        sampled = F.grid_sample(maps.to(grids.dtype), grids[:, :, level], padding_mode="zeros", align_corners=False)
        part = (sampled * weights[:, :, :, level]).sum(-1)  # (B * H, K, Q)
        total = part if total is None else total + part
    assert total is not None, "at least one map"
    return total.unflatten(0, (len(values_BSHK), values_BSHK.shape[2])).flatten(1, 2).transpose(1, 2)


def grid_places(sizes: Sequence[GridSize], device: torch.device) -> Tensor:
    """Returns the cell centres of several grids on one image, as fractions of the image's width and height.

    Args:
        sizes: rows and columns of each grid.
        device: device of the result.

    Returns:
        Position (x, y) of each centre, in row-major order, one grid after the other, (cells, 2) float32.
    """
    places = []
    for rows, columns in sizes:
        row = (torch.arange(rows, device=device) + 0.5) / rows
        column = (torch.arange(columns, device=device) + 0.5) / columns
        places.append(torch.stack(torch.meshgrid(row, column, indexing="ij")[::-1], -1).flatten(0, 1))
    return torch.cat(places)


def ring_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """Returns the initial bias of `sampling_offsets`, which places a head's points on a line from the query.

    The lines of the heads have evenly spread angles. A point has a distance from the query along x and one along y. For
    point p of a head, the larger of these two distances is p + 1 cells. So the points with the same p lie on a square
    around the query.
    """
    angles = torch.arange(num_heads) * (2 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions /= directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, num_points + 1)[None, None, :, None]
    return (directions[:, None, None] * steps).expand(-1, num_levels, -1, -1).flatten()
