"""Implements a 3 x 3 convolution with LayerNorm over channels, used in the box and mask heads."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

_EPSILON = 1e-6


class ConvNorm(nn.Module):
    """Applies a 3 x 3 convolution without bias, LayerNorm over the channels of each cell, and ReLU.

    Follows the heads of ViTDet (Li et al., 2022, arXiv:2203.16527). Unlike BatchNorm, LayerNorm keeps no running
    statistics and does not mix samples.
    """

    def __init__(self, channels: int) -> None:
        """Builds the layers with uninitialised parameters.

        Args:
            channels: number of input channels and of output channels.
        """
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(channels, _EPSILON)

    def forward(self, x_RCHW: Tensor) -> Tensor:
        """Returns features of the input's shape, (boxes, channels, height, width); there may be no boxes."""
        normed: Tensor = F.relu(self.norm(self.conv(x_RCHW)))
        return normed
