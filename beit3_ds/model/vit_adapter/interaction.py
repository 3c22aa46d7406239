"""Implements the injectors and extractors of a ViT-Adapter (arXiv:2205.08534, section 3.4)."""

# B images, N patches, L rows of the spatial pyramid, D hidden, F hidden width of the FFN.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.model.vit_adapter.config import AdapterConfig
from beit3_ds.model.vit_adapter.deformable_attention import DeformableAttention, GridSize, grid_places
from beit3_ds.model.vit_adapter.spatial_prior import as_map, as_rows

_PYRAMID_LEVELS = 3
_EPSILON = 1e-6


class Geometry(NamedTuple):
    """Holds the sizes and the cell centres of the patch grid and of the pyramid maps."""

    patches: GridSize
    """Rows and columns of the patch grid."""
    pyramid: Sequence[GridSize]
    """Rows and columns of each map of the feature pyramid."""
    patch_places: Tensor
    """Column and row of each patch centre, as fractions of the image, (N, 2)."""
    pyramid_places: Tensor
    """Column and row of each pyramid cell's centre, as fractions of the image, (L, 2)."""

    @classmethod
    def of(cls, patches: GridSize, pyramid: Sequence[GridSize], device: torch.device) -> "Geometry":
        """Builds the geometry from the sizes, and computes the cell centres."""
        return cls(patches, pyramid, grid_places([patches], device), grid_places(pyramid, device))


class RowNorm(nn.LayerNorm):
    """Applies LayerNorm in the dtype of its parameters, because autocast on a CPU does not accept mixed dtypes."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized rows, in the shape of the input."""
        return super().forward(x.to(self.weight.dtype))


class Injector(nn.Module):
    """Lets the patches attend to the feature pyramid, and adds gamma times the result to the patches.

    `gamma` is a learned vector with one factor per channel.
    """

    def __init__(self, hidden_size: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm = RowNorm(hidden_size, _EPSILON)
        self.feat_norm = RowNorm(hidden_size, _EPSILON)
        self.attn = _attention(hidden_size, config, _PYRAMID_LEVELS)
        self.gamma = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x_BND: Tensor, c_BLD: Tensor, geometry: Geometry) -> Tensor:
        """Returns the patches, (B, N, D) in row-major order, after attention to the pyramid rows `c_BLD`."""
        read_BND = self.attn(self.query_norm(x_BND), geometry.patch_places, self.feat_norm(c_BLD), geometry.pyramid)
        return x_BND + (self.gamma * read_BND).to(x_BND.dtype)


class Extractor(nn.Module):
    """Lets the feature pyramid attend to the patches, and then applies a ConvFFN to the pyramid."""

    def __init__(self, hidden_size: int, config: AdapterConfig) -> None:
        super().__init__()
        self.query_norm = RowNorm(hidden_size, _EPSILON)
        self.feat_norm = RowNorm(hidden_size, _EPSILON)
        self.attn = _attention(hidden_size, config, 1)
        self.ffn_norm = RowNorm(hidden_size, _EPSILON)
        self.ffn = ConvFFN(hidden_size, max(1, int(hidden_size * config.ffn_ratio)))

    def forward(self, c_BLD: Tensor, x_BND: Tensor, geometry: Geometry, factor_B: Tensor | None) -> Tensor:
        """Returns the updated pyramid rows, (B, L, D).

        Attention to the patches updates the pyramid rows first. The FFN then updates the result.

        Args:
            c_BLD: pyramid rows.
            x_BND: patches in row-major order.
            geometry: sizes of the patch grid and the pyramid.
            factor_B: stochastic-depth factor of the FFN for each image; None without stochastic depth.
        """
        patches = [geometry.patches]
        c_BLD = c_BLD + self.attn(self.query_norm(c_BLD), geometry.pyramid_places, self.feat_norm(x_BND), patches)
        added_BLD = self.ffn(self.ffn_norm(c_BLD), geometry.pyramid)
        return c_BLD + (added_BLD if factor_B is None else factor_B[:, None, None] * added_BLD)


class ConvFFN(nn.Module):
    """Applies an FFN. Before the GELU, each pyramid map goes through a depthwise 3 x 3 convolution."""

    def __init__(self, hidden_size: int, ffn_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, ffn_size)
        self.dwconv = nn.Conv2d(ffn_size, ffn_size, 3, padding=1, groups=ffn_size)
        self.fc2 = nn.Linear(ffn_size, hidden_size)

    def forward(self, c_BLD: Tensor, sizes: Sequence[GridSize]) -> Tensor:
        """Returns the output for each pyramid row, (B, L, D).

        Args:
            c_BLD: pyramid rows.
            sizes: rows and columns of each pyramid map.
        """
        parts = self.fc1(c_BLD).split([rows * columns for rows, columns in sizes], dim=1)
        mixed = [as_rows(self.dwconv(as_map(part, size))) for part, size in zip(parts, sizes, strict=True)]
        return self.fc2(F.gelu(torch.cat(mixed, 1)))


class Interaction(nn.Module):
    """Holds the injector and the extractors around a group of ViT blocks."""

    def __init__(self, hidden_size: int, config: AdapterConfig, num_extra_extractors: int) -> None:
        super().__init__()
        self.injector = Injector(hidden_size, config)
        self.extractor = Extractor(hidden_size, config)
        extra = [Extractor(hidden_size, config) for _ in range(num_extra_extractors)]
        self.extra_extractors = nn.ModuleList(extra)

    @property
    def num_extractors(self) -> int:
        """Returns the number of extractors. Each of them has a stochastic-depth factor."""
        return 1 + len(self.extra_extractors)

    def inject(self, x_BND: Tensor, c_BLD: Tensor, geometry: Geometry) -> Tensor:
        """Returns the injector's result: the patches for the next blocks, (B, N, D) in row-major order."""
        return self.injector(x_BND, c_BLD, geometry)

    def extract(self, c_BLD: Tensor, x_BND: Tensor, geometry: Geometry, factors: Sequence[Tensor | None]) -> Tensor:
        """Returns the pyramid rows after all extractors, (B, L, D).

        Args:
            c_BLD: pyramid rows.
            x_BND: patches after the group of blocks, in row-major order.
            geometry: sizes of the patch grid and the pyramid.
            factors: one entry per extractor: stochastic-depth factors, (B,), or None without stochastic depth.
        """
        for extractor, factor_B in zip((self.extractor, *self.extra_extractors), factors, strict=True):
            c_BLD = extractor(c_BLD, x_BND, geometry, factor_B)
        return c_BLD


def _attention(hidden_size: int, config: AdapterConfig, num_levels: int) -> DeformableAttention:
    value_size = config.value_size(hidden_size)
    return DeformableAttention(hidden_size, value_size, config.num_heads, num_levels, config.num_points)
