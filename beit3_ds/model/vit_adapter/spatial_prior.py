"""Implements the spatial prior of a ViT-Adapter (arXiv:2205.08534, section 3.3): a convolutional network."""

# B images, D hidden, L rows of the three coarser maps.

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from beit3_ds.model.vit_adapter.deformable_attention import GridSize

BuildNorm = Callable[[int], nn.Module]
"""Function that builds a norm for feature maps with a given number of channels."""

_MOST_GROUPS = 32


def group_norm(channels: int) -> nn.Module:
    """Builds a GroupNorm with at most 32 equal groups of at least two channels.

    The original code uses a batch norm over all ranks. A batch norm would make results depend on how a step is divided
    over ranks and micro-batches, and would have running statistics to save.
    """
    most = max(1, min(_MOST_GROUPS, channels // 2))  # a group of one value, in a map of one cell, has no variance
    groups = max(number for number in range(1, most + 1) if channels % number == 0)
    return MapNorm(groups, channels)


class MapNorm(nn.GroupNorm):
    """Applies GroupNorm in the dtype of its parameters, because autocast on a CPU does not accept mixed dtypes."""

    def forward(self, x_BDHW: Tensor) -> Tensor:
        """Returns the normalized maps, in the shape of the input."""
        return super().forward(x_BDHW.to(self.weight.dtype))


class SpatialPrior(nn.Module):
    """Computes four feature maps with 1/4, 1/8, 1/16 and 1/32 of the image's height and width.

    The three coarser maps, each with a learned level embedding added, form the feature pyramid of injectors and
    extractors.
    """

    def __init__(self, hidden_size: int, channels: int, build_norm: BuildNorm = group_norm) -> None:
        """Builds the convolutions.

        Args:
            hidden_size: number of channels D of the output maps.
            channels: number of channels of the first convolutions.
            build_norm: function that builds the norm after each convolution.
        """
        super().__init__()
        self.stem1 = _convolution(3, channels, 2, build_norm)
        self.stem2 = _convolution(channels, channels, 1, build_norm)
        self.stem3 = _convolution(channels, channels, 1, build_norm)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2 = _convolution(channels, 2 * channels, 2, build_norm)
        self.conv3 = _convolution(2 * channels, 4 * channels, 2, build_norm)
        self.conv4 = _convolution(4 * channels, 4 * channels, 2, build_norm)
        self.fc1 = nn.Conv2d(channels, hidden_size, 1)
        self.fc2 = nn.Conv2d(2 * channels, hidden_size, 1)
        self.fc3 = nn.Conv2d(4 * channels, hidden_size, 1)
        self.fc4 = nn.Conv2d(4 * channels, hidden_size, 1)
        self.level_embed = nn.Parameter(torch.empty(3, hidden_size))

    def forward(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor, list[GridSize]]:
        """Computes the maps of images of one size.

        Args:
            pixels_B3HW: images in [-1, 1].

        Returns:
            Three values. First, the finest map, (B, D, height / 4, width / 4). Second, the cells of the other three
            maps in row-major order, (B, L, D), with finer maps first. Third, for each of these three maps, its numbers
            of rows and columns.
        """
        x1 = self.pool(self.stem3(self.stem2(self.stem1(pixels_B3HW))))
        x2 = self.conv2(x1)
        x3 = self.conv3(x2)
        x4 = self.conv4(x3)
        maps = [self.fc2(x2), self.fc3(x3), self.fc4(x4)]
        rows = [as_rows(of) + level for of, level in zip(maps, self.level_embed, strict=True)]
        return self.fc1(x1), torch.cat(rows, 1), [(of.shape[2], of.shape[3]) for of in maps]


def _convolution(inputs: int, outputs: int, stride: int, build_norm: BuildNorm) -> nn.Sequential:
    """Builds a 3 x 3 convolution, a norm and a ReLU.

    The norm must have the name `norm`, because parameters with this word in their name get no weight decay.
    """
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(OrderedDict(conv=convolution, norm=build_norm(outputs), relu=nn.ReLU()))


def as_rows(maps_BDHW: Tensor) -> Tensor:
    """Flattens maps to rows in row-major order, (B, rows * columns, D)."""
    return maps_BDHW.flatten(2).transpose(1, 2)


def as_map(rows_BND: Tensor, size: GridSize) -> Tensor:
    """Reshapes rows in row-major order to maps, (B, D, rows, columns)."""
    return rows_BND.transpose(1, 2).unflatten(2, size)
