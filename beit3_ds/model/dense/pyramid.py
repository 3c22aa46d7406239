"""Implements ViTDet's simple feature pyramid, which makes maps of several strides from one map."""

# B images, D hidden, C output channels, H and W rows and columns of the grid of patches.

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.device_copy import copy_to_device
from beit3_ds.patch_grids import Grids

_PATCH = 16  # pixels on a side of the patches for which strides are named


class MapLayerNorm(nn.LayerNorm):
    """Normalises the channels at each place of a feature map, (B, C, H, W)."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns the normalised map, of the same shape."""
        return super().forward(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SimpleFeaturePyramid(nn.Module):
    """Makes maps of strides 4, 8, 16, 32 and 64 from the map of patches of 16 pixels (Li et al., 2022, section 3).

    Two transposed convolutions, one, none, and a max pooling change the resolution. Then a 1 x 1 and a 3 x 3
    convolution, each followed by a LayerNorm over the channels, give each map its output channels. The map of stride 64
    is a max pooling of the map of stride 32. Source: "Exploring Plain Vision Transformer Backbones for Object
    Detection", arXiv:2203.16527.
    """

    strides: ClassVar[Mapping[str, int]] = {"4": 4, "8": 8, "16": 16, "32": 32, "pool": 64}
    """Pixels per place of each map for patches of 16 pixels, by the map's name."""

    def __init__(self, hidden_size: int, out_channels: int = 256, epsilon: float = 1e-6) -> None:
        """Builds the layers.

        Args:
            hidden_size: width of the backbone, D; 4 must divide it.
            out_channels: channels of each map, C.
            epsilon: added to the variance in every LayerNorm.
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
        """Returns the maps by name, from fine to coarse, in the form that torchvision's detection heads take.

        Args:
            x_BDHW: map of the backbone's last layer (`dense.canvas.to_canvas`), or a map without images.
            grids: grid of each image, if they differ. The maps are then zero outside of their images, and inside they
                do not depend on the size of the largest grid. Empty if all images fill the map.
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
    """Returns True for the places of a map with a given stride inside each image, (B, 1, h, w).

    Returns None if all images fill the map.
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
    """Returns layers in sequence; initial values and weight decay recognise norms by these names."""
    return nn.Sequential(OrderedDict(layers))
