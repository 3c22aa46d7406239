"""Implements a convolution with LayerNorm over channels, of which the heads for boxes and masks consist."""

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

_EPSILON = 1e-6


class ConvNorm(nn.Module):
    """Applies a 3 x 3 convolution without bias, LayerNorm over the channels of each cell, and ReLU.

    ViTDet (Li et al., 2022, arXiv:2203.16527) uses it in its heads. Unlike BatchNorm, it has no state and mixes no
    samples.
    """

    def __init__(self, channels: int) -> None:
        """Builds the layers with uninitialised parameters; input and output have `channels` channels."""
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = LayerNorm2d(channels, _EPSILON)

    def forward(self, x_RCHW: Tensor) -> Tensor:
        """Returns features of the same shape; there may be none."""
        normed: Tensor = F.relu(self.norm(self.conv(x_RCHW)))
        return normed
