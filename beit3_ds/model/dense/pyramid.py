"""Implements ViTDet's simple feature pyramid, which makes maps of several strides from one map."""

# B images, D hidden, C output channels, H and W rows and columns of the grid of patches.

from collections import OrderedDict
from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn


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

    def forward(self, x_BDHW: Tensor) -> "OrderedDict[str, Tensor]":
        """Returns the maps by name, from fine to coarse, in the form that torchvision's detection heads take.

        Args:
            x_BDHW: map of the backbone's last layer (`dense.canvas.to_canvas`), or a map without images.
        """
        maps = OrderedDict((name, layers(x_BDHW)) for name, layers in self.maps.items())
        maps["pool"] = F.max_pool2d(maps["32"], 1, stride=2)
        return maps


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
