"""Encodes boxes as regression targets, matches boxes with objects, and pools the features of boxes."""

# B images, R boxes of all images, N boxes of one image, G objects of one image, C channels, S output side, L levels.
# A box is left, top, right, bottom in pixels of the model's input, float32.

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection._utils import encode_boxes as encode_with_weights
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
        objects_N4: boxes of the matched objects, one per row of `boxes_N4`, (N, 4).
        boxes_N4: anchors or proposals, (N, 4).
    """
    # The coder's own method would copy its weights from host memory, and the host would wait for the copy.
    weights_4 = torch.cat([boxes_N4.new_full((1,), weight) for weight in coder.weights])
    return encode_with_weights(objects_N4, boxes_N4, weights_4)


def decode_boxes(coder: BoxCoder, deltas_N4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Applies regression outputs to boxes; returns the refined boxes, (N, 4) float32; N may be 0.

    Args:
        coder: converts between boxes and regression targets.
        deltas_N4: regression outputs, (N, 4).
        boxes_N4: anchors or proposals, (N, 4).
    """
    # The coder's own method computes the same, but copies numbers from host memory, and the host waits for the copy.
    deltas_N4, boxes_N4 = deltas_N4.float(), boxes_N4.float()
    sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
    centres_N2 = boxes_N4[:, :2] + 0.5 * sides_N2
    x, y, width, height = (delta_N / weight for delta_N, weight in zip(deltas_N4.unbind(1), coder.weights, strict=True))
    growth_N2 = torch.stack([width, height], 1).clamp(max=coder.bbox_xform_clip).exp()
    centres_N2, halves_N2 = torch.stack([x, y], 1) * sides_N2 + centres_N2, 0.5 * (growth_N2 * sides_N2)
    return torch.cat([centres_N2 - halves_N2, centres_N2 + halves_N2], 1)


def clip_boxes(boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Clips boxes to an image.

    Args:
        boxes_N4: boxes in pixels of the image, (N, 4).
        size: height and width of the image in pixels.

    Returns:
        The clipped boxes in a new tensor, (N, 4).
    """
    height, width = size
    limits = (width, height, width, height)
    return torch.stack([boxes_N4[:, i].clamp(0, limit) for i, limit in enumerate(limits)], 1)


def has_area(boxes_N4: Tensor) -> Tensor:
    """Returns whether each box has a positive width and height, (N,) bool."""
    return (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(1)


def match_boxes(boxes_N4: Tensor, objects_G4: Tensor, high: float, low: float, *, keep_best: bool = False) -> Tensor:
    """Returns the index of the object that each box matches, (N,) int64; may be `BACKGROUND` or `IGNORED`.

    Args:
        boxes_N4: anchors or proposals, (N, 4).
        objects_G4: boxes of the image's objects, (G, 4); G may be 0.
        high: minimum IoU for a match. A box matches the object with which it has its largest IoU.
        low: a box is `BACKGROUND` if its largest IoU is below `low`, and `IGNORED` if its largest IoU is between `low`
            and `high`.
        keep_best: whether a best box of an object has a match even if its IoU is below `high`. The best boxes of an
            object are the boxes that have the largest IoU with this object. Like any other box, a best box matches the
            object with which it has its largest IoU. This may be another object.
    """
    if not len(objects_G4) or not len(boxes_N4):
        return torch.full((len(boxes_N4),), BACKGROUND, device=boxes_N4.device)
    # torchvision's Matcher computes the same, but its indices depend on values, for which the host waits.
    iou_GN = box_iou(objects_G4, boxes_N4)
    best_N, objects_N = iou_GN.max(0)
    matches_N = torch.where(best_N < high, IGNORED, objects_N).masked_fill(best_N < low, BACKGROUND)
    if keep_best:
        is_best_GN = iou_GN == iou_GN.max(1, keepdim=True).values
        matches_N = torch.where(is_best_GN.any(0), objects_N, matches_N)
    return matches_N


def repeat_edges(x_BCHW: Tensor, extents: Sequence[tuple[int, int]]) -> Tensor:
    """Repeats the last row and column of each image into the padding of a feature map.

    RoIAlign repeats the edge of a map for boxes at the edge of an image. In a padded map, RoIAlign would read zeros
    instead. The features of such a box would then depend on the sizes of the other images.

    Args:
        x_BCHW: features of all images, (images, channels, height, width).
        extents: rows and columns of each image in the map.
    """
    rows, columns = x_BCHW.shape[2:]
    if all(extent == (rows, columns) for extent in extents):
        return x_BCHW
    row_H, column_W = (torch.arange(side, device=x_BCHW.device) for side in (rows, columns))
    row_BH = torch.stack([row_H.clamp(max=own_rows - 1) for own_rows, _ in extents])
    column_BW = torch.stack([column_W.clamp(max=own_columns - 1) for _, own_columns in extents])
    x_BCHW = x_BCHW.gather(2, row_BH[:, None, :, None].expand_as(x_BCHW))
    return x_BCHW.gather(3, column_BW[:, None, None, :].expand_as(x_BCHW))


def pool_boxes(pyramid: Pyramid, boxes: Sequence[Tensor], size: int) -> Tensor:
    """Pools the features of each box by RoIAlign (He et al., 2017, arXiv:1703.06870).

    The area of a box selects its pyramid level (Lin et al., 2017, arXiv:1612.03144, equation 1). Pooling computes in
    float32; the result has the dtype of the features.

    Args:
        pyramid: feature maps by stride.
        boxes: boxes of each image, (N, 4) each.
        size: rows and columns of the result.

    Returns:
        Features of the boxes of all images, (boxes, channels, size, size).
    """
    strides = sorted(pyramid)
    first = pyramid[strides[0]]
    rois_R5 = _with_image(boxes, first.device)
    levels_R = _levels(rois_R5[:, 1:], strides)
    order_R = levels_R.argsort(stable=True)
    is_of_level_RL = levels_R[:, None] == torch.arange(len(strides), device=first.device)
    counts = is_of_level_RL.sum(0).tolist()  # waits for the device
    pooled = [  # even without boxes, to keep every level in the autograd graph
        roi_align(pyramid[stride].float(), rois, (size, size), 1 / stride, _SAMPLES_PER_BIN, aligned=True).to(
            first.dtype
        )
        for stride, rois in zip(strides, rois_R5[order_R].split(counts), strict=True)
    ]
    return torch.cat(pooled).index_select(0, order_R.argsort())  # autograd keeps no features


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
