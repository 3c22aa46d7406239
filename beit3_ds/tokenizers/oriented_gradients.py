"""Defines a teacher for the visual tokenizer: gradients and colours of patches, without a pretrained network."""

# B images, N patches per image, G patches on a side, S pixels on a side, E features per patch.

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.config import ConfigError

_NUM_ORIENTATIONS = 9  # bins over [0, pi); Dalal and Triggs' choice
_CELLS = 2  # mean colours along one side of a patch
_NEIGHBORHOOD = 3  # patches along one side
_FAINT = 0.1  # norm below which gradients are noise of the image's compression rather than strokes


class OrientedGradients:
    """Computes features of each patch from gradients and colours in the patch and in its neighbourhood.

    This teacher needs no download. It captures strokes, textures, colours and positions, but no objects. For codes of
    high quality, use a pretrained network such as CLIP or DINO.

    Gradients are described by histograms of orientation (HOG; Dalal and Triggs, 2005, "Histograms of Oriented Gradients
    for Human Detection"). In MaskFeat (Wei et al., 2022, arXiv:2112.09133), such histograms were as good targets as the
    features of a network. Patches without gradients differ in their mean colours only.

    The patch itself gives one histogram and 2 x 2 mean colours. The 3 x 3 patches centred on the patch give one
    histogram and one mean colour. Each histogram is normalised, so that faint strokes count nearly as much as bold
    strokes.

    Args:
        patch_size: side of a patch in pixels; must be even.

    Attributes:
        width: number of features per patch.

    Raises:
        ConfigError: if `patch_size` is odd.
    """

    def __init__(self, patch_size: int) -> None:
        if patch_size % _CELLS:
            raise ConfigError(
                f"tokenizers.visual: the oriented_gradients teacher halves every patch, so patch_size={patch_size} "
                f"must be even."
            )
        self.patch_size = patch_size
        self.width = 2 * _NUM_ORIENTATIONS + 3 * (_CELLS**2 + 1)

    def to(self, device: torch.device) -> None:
        """Does nothing, because this teacher has no tensors."""

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """Computes the features of every patch.

        Args:
            pixels: images, (images, 3, size, size) float in [-1, 1]; `size` must be a multiple of `patch_size`.

        Returns:
            Features, (images, patches, features) float32, with patches in row-major order.
        """
        pixels = pixels.float()
        cell_colors = F.avg_pool2d(pixels, self.patch_size // _CELLS)
        colors = F.avg_pool2d(pixels, self.patch_size)
        gradients = F.avg_pool2d(_orientation_votes(pixels), self.patch_size)
        patch = torch.cat([_unit_length(gradients), _scale_to_white(F.pixel_unshuffle(cell_colors, _CELLS))], dim=1)
        around = torch.cat([_unit_length(_neighborhood(gradients)), _scale_to_white(_neighborhood(colors))], dim=1)
        return torch.cat([patch, around], dim=1).flatten(2).transpose(1, 2)


def _orientation_votes(pixels: Tensor) -> Tensor:
    """Splits each pixel's gradient magnitude between the two nearest of 9 orientations, (images, 9, size, size)."""
    padded = F.pad(pixels, (1, 1, 1, 1), mode="replicate")
    horizontal = (padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]) / 2
    vertical = (padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]) / 2
    strongest = (horizontal.square() + vertical.square()).argmax(dim=1, keepdim=True)
    horizontal, vertical = horizontal.gather(1, strongest), vertical.gather(1, strongest)
    magnitude = torch.hypot(horizontal, vertical)
    position = torch.atan2(vertical, horizontal) * (_NUM_ORIENTATIONS / math.pi)  # in bins, from -9 to 9
    lower = position.floor()
    upper_vote = magnitude * (position - lower)
    bin_ = lower.long() % _NUM_ORIENTATIONS
    votes = magnitude.new_zeros(pixels.shape[0], _NUM_ORIENTATIONS, *pixels.shape[2:])
    votes.scatter_add_(1, bin_, magnitude - upper_vote)
    return votes.scatter_add_(1, (bin_ + 1) % _NUM_ORIENTATIONS, upper_vote)


def _neighborhood(features: Tensor) -> Tensor:
    """Averages features over the 3 x 3 patches around each patch, (images, channels, grid, grid)."""
    margin = _NEIGHBORHOOD // 2
    padded = F.pad(features, (margin,) * 4, mode="replicate")
    return F.avg_pool2d(padded, _NEIGHBORHOOD, stride=1)


def _unit_length(histograms: Tensor) -> Tensor:
    """Normalises histograms to a length of about 1 over all channels; those of almost flat patches stay near zero."""
    return histograms / (histograms.square().sum(dim=1, keepdim=True) + _FAINT**2).sqrt()


def _scale_to_white(colors: Tensor) -> Tensor:
    """Scales colour features so that those of a white patch have the 2-norm 1, like a normalised histogram."""
    return colors / math.sqrt(colors.shape[1])
