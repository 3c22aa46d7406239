"""Implements ViT-Adapter (arXiv:2205.08534): a spatial prior, interactions with the ViT, and four output maps."""

# B images, N patches, L rows of the spatial pyramid, D hidden, E extractors.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3_ds.model.vit_adapter.config import AdapterConfig
from beit3_ds.model.vit_adapter.deformable_attention import GridSize
from beit3_ds.model.vit_adapter.interaction import Geometry, Interaction
from beit3_ds.model.vit_adapter.spatial_prior import BuildNorm, SpatialPrior, as_map, group_norm

RunBlocks = Callable[[Tensor, range], Tensor]
"""Function that runs a range of the ViT's blocks (0-based) on patches in row-major order, (B, N, D)."""


class ViTAdapter(nn.Module):
    """Adds four feature maps to a plain ViT. The maps have 1/4, 1/8, 1/16 and 1/32 of the image's height and width.

    Convolutions compute a feature pyramid. Before each group of ViT blocks, the patches attend to the pyramid
    (injector). After the group, the pyramid attends to the patches (extractor). These attentions are deformable. The
    caller owns and runs the ViT's blocks.

    All images of a call have the same size. The forward pass draws no random numbers and does not communicate.
    """

    def __init__(
        self,
        config: AdapterConfig,
        hidden_size: int,
        num_layers: int,
        build_norm: BuildNorm = group_norm,
        *,
        recomputes: bool = False,
    ) -> None:
        """Builds the adapter with uninitialized parameters; for initial values see `adapter_initial_value`.

        Args:
            config: sizes of the adapter.
            hidden_size: hidden size D of the ViT.
            num_layers: number of blocks of the ViT.
            build_norm: function that builds the norms of the spatial prior and of the output maps.
            recomputes: whether the backward pass recomputes injectors and extractors.

        Raises:
            ConfigError: if the sizes do not fit the ViT.
        """
        super().__init__()
        config.check(hidden_size, num_layers)
        self.recomputes = recomputes
        self.block_ranges = config.block_ranges(num_layers)
        self.prior = SpatialPrior(hidden_size, config.conv_channels, build_norm)
        last = config.num_interactions - 1
        extra = [config.num_extra_extractors if number == last else 0 for number in range(last + 1)]
        self.interactions = nn.ModuleList(Interaction(hidden_size, config, number) for number in extra)
        self.output = OutputMaps(hidden_size, build_norm, adds_trunk_features=config.adds_trunk_features)

    @property
    def num_extractors(self) -> int:
        """Returns the number of extractors (E). Each of them has a stochastic-depth factor."""
        return sum(interaction.num_extractors for interaction in self._ordered())

    def _ordered(self) -> list[Interaction]:
        return [interaction for interaction in self.interactions if isinstance(interaction, Interaction)]

    def forward(
        self,
        pixels_B3HW: Tensor,
        x_BND: Tensor,
        grid: GridSize,
        run_blocks: RunBlocks,
        factors_BE: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Runs the ViT's blocks with the adapter around them, and returns four feature maps.

        Args:
            pixels_B3HW: images of one size, in [-1, 1].
            x_BND: embedded patches with positions, in row-major order.
            grid: rows and columns of the patch grid.
            run_blocks: function that runs a range of the ViT's blocks on the patches.
            factors_BE: stochastic-depth factor of each extractor's FFN, for each image; None without stochastic depth.

        Returns:
            Maps with 1/4, 1/8, 1/16 and 1/32 of the image's height and width, each (B, D, rows, columns).
        """
        c1_BDHW, c_BLD, pyramid = self.prior(pixels_B3HW)
        geometry, trunk, used = Geometry.of(grid, pyramid, x_BND.device), [], 0
        for interaction, blocks in zip(self._ordered(), self.block_ranges, strict=True):
            x_BND = run_blocks(self._call(interaction.inject, x_BND, c_BLD, geometry), blocks)
            number = interaction.num_extractors
            factors = [None if factors_BE is None else factors_BE[:, used + place] for place in range(number)]
            c_BLD = self._call(interaction.extract, c_BLD, x_BND, geometry, factors)
            used += number
            trunk.append(x_BND)
        return self.output(c1_BDHW, c_BLD, trunk, geometry)

    def _call(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        if self.recomputes and torch.is_grad_enabled():
            return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
        return function(*arguments)


class OutputMaps(nn.Module):
    """Computes the four output maps from the feature pyramid and the patches."""

    def __init__(self, hidden_size: int, build_norm: BuildNorm, *, adds_trunk_features: bool) -> None:
        super().__init__()
        self.adds_trunk_features = adds_trunk_features
        self.up = nn.ConvTranspose2d(hidden_size, hidden_size, 2, stride=2)
        self.norm1 = build_norm(hidden_size)
        self.norm2 = build_norm(hidden_size)
        self.norm3 = build_norm(hidden_size)
        self.norm4 = build_norm(hidden_size)

    def forward(
        self, c1_BDHW: Tensor, c_BLD: Tensor, trunk: Sequence[Tensor], geometry: Geometry
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the four output maps, finest first.

        Args:
            c1_BDHW: finest map of the spatial prior.
            c_BLD: pyramid rows after the last extractor.
            trunk: patches after each of the n interactions, (B, N, D) each. If `adds_trunk_features` is True, patches
                are resized and added to each map. The map with number p, from 1 (finest) to 4 (coarsest), gets the
                patches after interaction max(1, floor(n * p / 4)). Interactions are counted from 1.
            geometry: sizes of the maps.
        """
        lengths = [rows * columns for rows, columns in geometry.pyramid]
        parts = zip(c_BLD.split(lengths, dim=1), geometry.pyramid, strict=True)
        c2, c3, c4 = (as_map(rows, size) for rows, size in parts)
        finest = self.up(c2)[:, :, : c1_BDHW.shape[2], : c1_BDHW.shape[3]]
        maps = [c1_BDHW + finest, c2, c3, c4]
        if self.adds_trunk_features:
            turns = [max(0, len(trunk) * place // 4 - 1) for place in range(1, 5)]
            own = [as_map(trunk[turn], geometry.patches) for turn in turns]
            resized = zip(maps, own, strict=True)
            maps = [of + F.interpolate(x, of.shape[2:], mode="bilinear", align_corners=False) for of, x in resized]
        return self.norm1(maps[0]), self.norm2(maps[1]), self.norm3(maps[2]), self.norm4(maps[3])
