"""Proposes boxes that may contain objects, with a region proposal network (Ren et al., 2015, arXiv:1506.01497)."""

# B images, C channels, A anchors per cell, N anchors of one image, L levels.

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import nms

from beit3_ds.tasks.detection.boxes import (
    BACKGROUND,
    Pyramid,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    has_area,
    match_boxes,
)
from beit3_ds.tasks.detection.objects import ImageObjects
from beit3_ds.tasks.detection.sampling import random_priorities, sample_balanced
from beit3_ds.tasks.detection.views import Size

_ASPECTS = (0.5, 1.0, 2.0)
_OBJECT_IOU, _BACKGROUND_IOU = 0.7, 0.3
_POSITIVE_SHARE = 0.5
_NMS_IOU = 0.7
_CODER = BoxCoder((1.0, 1.0, 1.0, 1.0))
_PURPOSE = 1


class ImageAnchors(NamedTuple):
    """Holds the anchors of one image and the proposal network's outputs for them, level by level."""

    boxes: Tensor
    """Box of each anchor, (N, 4) float32."""
    logits: Tensor
    """Objectness logit of each anchor, (N,) float32."""
    deltas: Tensor
    """Box regression outputs of each anchor, (N, 4) float32."""
    level_counts: tuple[int, ...]
    """Number of anchors on each pyramid level."""


class LevelOutputs(NamedTuple):
    """Holds the proposal network's outputs for all images, level by level."""

    levels: tuple[tuple[Tensor, Tensor], ...]
    """For each level, the objectness logits, (images, anchors, rows, columns) float32, and the box regression outputs,
    (images, 4 * anchors, rows, columns) float32. `anchors` is the number of anchors per cell."""
    nothing: Tensor
    """Scalar with the value 0 that connects every parameter to the autograd graph."""


class ProposalNetwork(nn.Module):
    """Predicts for each anchor whether the anchor contains an object, and how to refine the anchor's box.

    Only the cells inside an image have anchors. Features outside an image are zero before every convolution. The
    outputs for an image therefore do not depend on the other images of a batch.
    """

    def __init__(self, channels: int, strides: Sequence[int], anchor_scale: float) -> None:
        """Builds two convolutions and two output layers, with uninitialised parameters.

        Args:
            channels: number of channels of the pyramid.
            strides: stride of each level in pixels, ascending.
            anchor_scale: side of an anchor, divided by the stride of the anchor's level.
        """
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.objectness = nn.Conv2d(channels, len(_ASPECTS), 1)
        self.deltas = nn.Conv2d(channels, 4 * len(_ASPECTS), 1)
        self._strides = tuple(strides)
        sides = tuple((round(anchor_scale * stride),) for stride in strides)
        self._anchors = AnchorGenerator(sides, (_ASPECTS,) * len(strides))

    def forward(self, pyramid: Pyramid, sizes: Sequence[Size]) -> LevelOutputs:
        """Returns the outputs of all levels, and a scalar 0 that depends on every parameter.

        The loss adds the 0, so all parameters get a gradient even in a batch without images. The number of output
        tensors does not depend on the number of images. ZeRO-3 needs this: it runs one hook per output tensor in the
        backward pass, and all data-parallel ranks must run the same hooks.

        Args:
            pyramid: feature maps by stride, zero outside the images.
            sizes: height and width of each image in pixels.
        """
        levels: list[tuple[Tensor, Tensor]] = []
        for stride in self._strides:
            x_BCHW = pyramid[stride]
            inside = _inside(sizes, stride, x_BCHW)
            for conv in self.convs:
                x_BCHW = F.relu(conv(x_BCHW))
                x_BCHW = x_BCHW if inside is None else x_BCHW * inside
            levels.append((self.objectness(x_BCHW).float(), self.deltas(x_BCHW).float()))
        nothing = 0 * torch.stack([output.sum() for of_level in levels for output in of_level]).sum()
        return LevelOutputs(tuple(levels), nothing)

    def anchors(self, outputs: LevelOutputs, sizes: Sequence[Size]) -> list[ImageAnchors]:
        """Returns each image's anchors, and the network's outputs for these anchors.

        Args:
            outputs: outputs of `forward` for the same images.
            sizes: height and width of each image in pixels.
        """
        return [self._of_image(outputs.levels, image, size) for image, size in enumerate(sizes)]

    def _of_image(self, levels: Sequence[tuple[Tensor, Tensor]], image: int, size: Size) -> ImageAnchors:
        device = levels[0][0].device
        grids = [_grid(size, stride) for stride in self._strides]
        self._anchors.set_cell_anchors(torch.float32, device)
        boxes = self._anchors.grid_anchors(grids, [(stride, stride) for stride in self._strides])
        logits, deltas = [], []
        for (logits_BAHW, deltas_BNHW), (rows, columns) in zip(levels, grids, strict=True):
            logits.append(logits_BAHW[image, :, :rows, :columns].permute(1, 2, 0).flatten())
            deltas.append(deltas_BNHW[image, :, :rows, :columns].permute(1, 2, 0).reshape(-1, 4))
        return ImageAnchors(torch.cat(boxes), torch.cat(logits), torch.cat(deltas), tuple(map(len, boxes)))


def anchor_losses(anchors: ImageAnchors, objects: ImageObjects, seed: Tensor, count: int) -> Tensor:
    """Returns an image's objectness loss and regression loss over sampled anchors, divided by `count`, (2,) float32.

    At most half of the sampled anchors match an object. The divisor is constant, so the loss does not depend on the
    other images of a batch.

    Args:
        anchors: anchors of the image with the network's outputs.
        objects: objects of the image; there may be none.
        seed: seed of the image, int64 scalar.
        count: number of anchors to sample.
    """
    matches_N = match_boxes(anchors.boxes, objects.boxes, _OBJECT_IOU, _BACKGROUND_IOU, keep_best=True)
    priorities_N = random_priorities(seed, len(matches_N), _PURPOSE)
    positive, negative = sample_balanced(matches_N >= 0, matches_N == BACKGROUND, count, _POSITIVE_SHARE, priorities_N)
    logits = torch.cat([anchors.logits[positive], anchors.logits[negative]])
    truth = torch.cat([torch.ones_like(positive), torch.zeros_like(negative)]).float()
    objectness = F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")
    wanted = encode_boxes(_CODER, objects.boxes[matches_N[positive]], anchors.boxes[positive])
    regression = F.l1_loss(anchors.deltas[positive], wanted, reduction="sum")
    return torch.stack([objectness, regression]) / count


class Proposals(NamedTuple):
    """Holds the proposals of one image, in descending order of objectness."""

    boxes: Tensor
    """Box of each proposal, (N, 4) float32."""
    anchors: Tensor
    """Index of the anchor of each proposal, (N,) int64."""


@torch.no_grad()
def propose(anchors: ImageAnchors, size: Size, per_level: int, count: int) -> Proposals:
    """Returns the best-scored proposals of an image, after non-maximum suppression within each level.

    Args:
        anchors: anchors of the image with the network's outputs.
        size: height and width of the image in pixels; proposals are clipped to the image.
        per_level: number of best-scored anchors per level that become proposals, before suppression.
        count: maximum number of proposals after suppression.
    """
    boxes, logits, levels, indices, start = [], [], [], [], 0
    parts = zip(*(x.split(anchors.level_counts) for x in anchors[:3]), strict=True)
    for level, (boxes_N4, logits_N, deltas_N4) in enumerate(parts):
        best = logits_N.topk(min(per_level, len(logits_N)))
        found = clip_boxes(decode_boxes(_CODER, deltas_N4[best.indices], boxes_N4[best.indices]), size)
        boxes.append(found)
        logits.append(best.values)
        levels.append(torch.full_like(best.indices, level))
        indices.append(start + best.indices)
        start += len(logits_N)
    every = tuple(map(torch.cat, (boxes, logits, levels, indices)))
    kept = (has_area(every[0]) & every[1].isfinite()).nonzero()[:, 0]
    found, scores, level_N, index_N = (values[kept] for values in every)
    if not len(kept):
        return Proposals(found, index_N)
    # Shifts the boxes of each level, so that levels do not overlap. torchvision's batched_nms does the same, but
    # copies a number from host memory.
    apart = found + (level_N * (found.max() + 1))[:, None]
    chosen = nms(apart, scores, _NMS_IOU)[:count]
    return Proposals(found[chosen], index_N[chosen])


def _grid(size: Size, stride: int) -> Size:
    """Returns the number of rows and columns of cells that an image covers, including partly covered cells."""
    height, width = size
    return math.ceil(height / stride), math.ceil(width / stride)


def _inside(sizes: Sequence[Size], stride: int, x_BCHW: Tensor) -> Tensor | None:
    """Returns a mask of 1 for cells inside the images and 0 for padding, (images, 1, rows, columns).

    Returns None if there is no padding.
    """
    grids = [_grid(size, stride) for size in sizes]
    if all(grid == tuple(x_BCHW.shape[-2:]) for grid in grids):
        return None
    inside = x_BCHW.new_zeros(len(x_BCHW), 1, *x_BCHW.shape[-2:])
    for image, (rows, columns) in enumerate(grids):
        inside[image, :, :rows, :columns] = 1
    return inside
