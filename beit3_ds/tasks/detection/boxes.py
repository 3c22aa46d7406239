"""Encodes boxes as regression targets, matches boxes with objects, and pools the features of boxes."""

# B images, R boxes of all images, N boxes of one image, G objects of one image, C channels, S output side.
# A box is left, top, right, bottom in pixels of the model's input, float32.

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import box_iou, roi_align

Pyramid = Mapping[int, Tensor]
"""Type of a feature pyramid: maps the stride of each level, in pixels, to features (images, channels, rows, columns).
"""

BACKGROUND = -1
"""Object index of a box without a matching object."""
IGNORED = -2
"""Object index of a box that overlaps an object too little to match and too much to be background."""

_CANONICAL_SIDE, _CANONICAL_LEVEL = 224, 4  # a box of 224 pixels uses the level of stride 16 (arXiv:1612.03144, eq. 1)
_SAMPLES_PER_BIN = 2


def encode_boxes(coder: BoxCoder, objects_N4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Returns the regression targets from each box to its object, (N, 4) float32; N may be 0.

    Args:
        coder: converts between boxes and regression targets.
        objects_N4: box of the object that each box matches, (N, 4).
        boxes_N4: anchors or proposals, (N, 4).
    """
    return coder.encode_single(objects_N4, boxes_N4)


def decode_boxes(coder: BoxCoder, deltas_N4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Applies regression outputs to boxes; returns the refined boxes, (N, 4) float32; N may be 0.

    Args:
        coder: converts between boxes and regression targets.
        deltas_N4: regression outputs, (N, 4).
        boxes_N4: anchors or proposals, (N, 4).
    """
    return coder.decode_single(deltas_N4.float(), boxes_N4).reshape(-1, 4)


def clip_boxes(boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Clips boxes to an image, (N, 4).

    Args:
        boxes_N4: boxes in pixels of the image, (N, 4).
        size: height and width of the image in pixels.
    """
    height, width = size
    return torch.minimum(boxes_N4.clamp(min=0), boxes_N4.new_tensor((width, height, width, height)))


def has_area(boxes_N4: Tensor) -> Tensor:
    """Returns whether each box has a positive width and height, (N,) bool."""
    return (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(1)


def match_boxes(boxes_N4: Tensor, objects_G4: Tensor, high: float, low: float, *, keep_best: bool = False) -> Tensor:
    """Returns the index of the object that each box matches, (N,) int64; may be `BACKGROUND` or `IGNORED`.

    Args:
        boxes_N4: anchors or proposals, (N, 4).
        objects_G4: boxes of the image's objects, (G, 4); G may be 0.
        high: minimum IoU for a match; the box matches the object with the largest IoU.
        low: a box is `BACKGROUND` if the largest IoU is below `low`, and `IGNORED` if it is between `low` and `high`.
        keep_best: whether each object also matches the boxes that overlap the object most, even if the IoU is below
            `high`.
    """
    if not len(objects_G4) or not len(boxes_N4):
        return torch.full((len(boxes_N4),), BACKGROUND, device=boxes_N4.device)
    matches: Tensor = Matcher(high, low, allow_low_quality_matches=keep_best)(box_iou(objects_G4, boxes_N4))
    return matches


def repeat_edges(x_BCHW: Tensor, extents: Sequence[tuple[int, int]]) -> Tensor:
    """Repeats the last row and column of each image into the padding of a feature map, (B, C, H, W).

    RoIAlign repeats the edge of a map for boxes at the edge of an image. In a padded map, RoIAlign would read zeros
    instead. The features of such a box would then depend on the sizes of the other images.

    Args:
        x_BCHW: features of all images, (B, C, H, W).
        extents: rows and columns of each image in the map.
    """
    rows, columns = x_BCHW.shape[2:]
    if all(extent == (rows, columns) for extent in extents):
        return x_BCHW
    last = torch.tensor(extents, device=x_BCHW.device) - 1
    row_BH = torch.arange(rows, device=x_BCHW.device).minimum(last[:, :1])
    column_BW = torch.arange(columns, device=x_BCHW.device).minimum(last[:, 1:])
    x_BCHW = x_BCHW.gather(2, row_BH[:, None, :, None].expand_as(x_BCHW))
    return x_BCHW.gather(3, column_BW[:, None, None, :].expand_as(x_BCHW))


def pool_boxes(pyramid: Pyramid, boxes: Sequence[Tensor], size: int) -> Tensor:
    """Pools the features of each box by RoIAlign (He et al., 2017, arXiv:1703.06870), (R, C, size, size).

    The area of a box selects its pyramid level (Lin et al., 2017, arXiv:1612.03144, equation 1). Pooling computes in
    float32; the result has the dtype of the features.

    Args:
        pyramid: feature maps by stride.
        boxes: boxes of each image, (N, 4) each.
        size: rows and columns of the result.
    """
    strides = sorted(pyramid)
    first = pyramid[strides[0]]
    rois_R5 = _with_image(boxes, first.device)
    levels_R = _levels(rois_R5[:, 1:], strides)
    pooled = first.new_zeros((len(rois_R5), first.shape[1], size, size), dtype=torch.float32)
    for level, stride in enumerate(strides):
        own = (levels_R == level).nonzero()[:, 0]
        features = roi_align(
            pyramid[stride].float(), rois_R5[own], (size, size), 1 / stride, _SAMPLES_PER_BIN, aligned=True
        )
        pooled = pooled.index_add(0, own, features)  # even without boxes, to keep every level in the autograd graph
    return pooled.to(first.dtype)


def _with_image(boxes: Sequence[Tensor], device: torch.device) -> Tensor:
    numbered = [torch.cat([of_image.new_full((len(of_image), 1), i), of_image], 1) for i, of_image in enumerate(boxes)]
    return torch.cat(numbered).float() if numbered else torch.empty(0, 5, dtype=torch.float32, device=device)


def _levels(boxes_R4: Tensor, strides: Sequence[int]) -> Tensor:
    sides_R = (boxes_R4[:, 2:] - boxes_R4[:, :2]).clamp(min=0).prod(1).sqrt()
    wanted_R = torch.floor(_CANONICAL_LEVEL + torch.log2(sides_R / _CANONICAL_SIDE + 1e-8))
    first = int(math.log2(strides[0]))
    return (wanted_R.clamp(first, first + len(strides) - 1) - first).long()


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx * ctx.scale, None


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Returns `x` unchanged; the backward pass multiplies the gradient by `scale`."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)
    return scaled
