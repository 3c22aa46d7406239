"""Implements ViTDet's simple feature pyramid, which computes maps of several strides from one map."""

# B images, D hidden, C output channels, H and W rows and columns of the grid of patches.

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.device_copy import copy_to_device
from beit3_ds.patch_grids import Grids

_PATCH = 16  # patch side in pixels for which the strides are named


class MapLayerNorm(nn.LayerNorm):
    """Applies LayerNorm over the channels of each cell of a feature map, (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns the normalized map, in the shape of the input."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Computes maps of strides 4, 8, 16, 32 and 64 from the backbone's map of stride 16 (ViTDet, section 3).

    Two transposed convolutions give stride 4, one gives stride 8, and max pooling gives stride 32. The maps of strides
    4 to 32 then pass through a 1 x 1 and a 3 x 3 convolution with C output channels. A LayerNorm over the channels
    follows each of these convolutions. Max pooling of the map of stride 32 gives stride 64. Source: Li et al., 2022,
    arXiv:2203.16527.
    """

    strides: ClassVar[Mapping[str, int]] = {"4": 4, "8": 8, "16": 16, "32": 32, "pool": 64}
    """Stride of each map in pixels, by the map's name, for patches of 16 pixels."""

    def __init__(self, hidden_size: int, out_channels: int = 256, epsilon: float = 1e-6) -> None:
        """Builds the layers of all maps.

        Args:
            hidden_size: hidden size D of the backbone; must be divisible by 4.
            out_channels: number of channels C of each map.
            epsilon: epsilon of every LayerNorm.
        """
        super().__init__()
        self.out_channels = out_channels
        half, quarter = hidden_size // 2, hidden_size // 4
        double = _named(
            upsampling1=nn.ConvTranspose2d(hidden_size, half, 2, stride=2),
            norm=MapLayerNorm(half, epsilon),
            gelu=nn.GELU(),
            upsampling2=nn.ConvTranspose2d(half, quarter, 2, stride=2),
        )
        resamplings = {
            "4": (double, quarter),
            "8": (nn.ConvTranspose2d(hidden_size, half, 2, stride=2), half),
            "16": (nn.Identity(), hidden_size),
            "32": (nn.MaxPool2d(2, ceil_mode=True), hidden_size),
        }
        self.maps = nn.ModuleDict(
            {
                name: _named(resampling=resampling, **_output_layers(channels, out_channels, epsilon))
                for name, (resampling, channels) in resamplings.items()
            }
        )

    def forward(self, x_BDHW: Tensor, grids: Grids = ()) -> "OrderedDict[str, Tensor]":
        """Returns the maps by name, finest first, in the form that torchvision's detection heads expect.

        Args:
            x_BDHW: map of the backbone's last layer (`dense.canvas.to_canvas`); may contain no images.
            grids: rows and columns of each image's patch grid; empty if every image fills `x_BDHW`. With grids, the
                returned maps are zero outside each image, and values inside an image do not depend on the other images.
        """
        maps = OrderedDict()
        for name, layers in self.maps.items():
            inside = _inside(grids, self.strides[name], x_BDHW)
            part = layers.get_submodule
            is_pooled = isinstance(part("resampling"), nn.MaxPool2d)
            x = part("resampling")(_fill_outside(x_BDHW, grids, -torch.inf) if is_pooled else x_BDHW)
            x = part("lateral_norm")(part("lateral")(_keep(x, inside)))
            maps[name] = _keep(part("output_norm")(part("output")(_keep(x, inside))), inside)
        maps["pool"] = F.max_pool2d(maps["32"], 1, stride=2)
        return maps


def _inside(grids: Grids, stride: int, x_BDHW: Tensor) -> Tensor | None:
    """Returns a mask that is True for the cells inside each image, (B, 1, h, w), for a map of a given stride.

    Returns None if every image fills the map.
    """
    height, width = x_BDHW.shape[2:]
    if all(grid == (height, width) for grid in grids):
        return None
    sides = [[-(-side * _PATCH // stride) for side in grid] for grid in (*grids, (height, width))]
    rows, columns = (torch.arange(side, device=x_BDHW.device) for side in sides[-1])
    own_B2 = copy_to_device(torch.tensor(sides[:-1]), x_BDHW.device)
    return ((rows[:, None] < own_B2[:, :1, None]) & (columns < own_B2[:, 1:, None]))[:, None]


def _keep(x: Tensor, inside: Tensor | None) -> Tensor:
    return x if inside is None else torch.where(inside, x, 0.0)


def _fill_outside(x_BDHW: Tensor, grids: Grids, value: float) -> Tensor:
    inside = _inside(grids, _PATCH, x_BDHW)
    return x_BDHW if inside is None else torch.where(inside, x_BDHW, value)


def _output_layers(channels: int, out_channels: int, epsilon: float) -> dict[str, nn.Module]:
    return {
        "lateral": nn.Conv2d(channels, out_channels, 1, bias=False),
        "lateral_norm": MapLayerNorm(out_channels, epsilon),
        "output": nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        "output_norm": MapLayerNorm(out_channels, epsilon),
    }


def _named(**layers: nn.Module) -> nn.Sequential:
    """Returns layers in sequence, under the given names. Weight decay and initialization recognize norms by these
    names.
    """
    return nn.Sequential(OrderedDict(layers))
