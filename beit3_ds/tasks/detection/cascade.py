"""Classifies and refines boxes in three stages (Cascade R-CNN, Cai and Vasconcelos, 2018, arXiv:1712.00726)."""

# R boxes of all images, N boxes of one image, C channels, S side of pooled features, K classes.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder

from beit3_ds.tasks.detection.boxes import (
    IGNORED,
    Pyramid,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    has_area,
    match_boxes,
    pool_boxes,
    scale_gradient,
)
from beit3_ds.tasks.detection.conv_norm import ConvNorm
from beit3_ds.tasks.detection.objects import ImageObjects
from beit3_ds.tasks.detection.proposals import Proposals
from beit3_ds.tasks.detection.sampling import random_priorities, sample_balanced
from beit3_ds.tasks.detection.views import Size

IOUS = (0.5, 0.6, 0.7)
"""Minimum IoU with an object at which a box is positive, for each stage."""
_POSITIVE_SHARE = 0.25
_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
_CODERS = tuple(BoxCoder(weights) for weights in _WEIGHTS)
_POOLED_SIDE = 7
_NUM_CONVS = 4
_PURPOSE = 2
_NO_LABEL = -100  # of a box that no loss counts


class SampledBoxes(NamedTuple):
    """Holds sampled boxes of one image and the objects that they match."""

    boxes: Tensor
    """Boxes, (N, 4) float32."""
    matches: Tensor
    """Index of the object that each box matches, (N,) int64; `BACKGROUND` for a box that matches no object, `IGNORED`
    for a box that no loss counts."""
    num_positive: int = 0
    """Number of boxes that match an object; these boxes come first in `boxes`. Set only for sampled proposals; 0 for
    refined boxes, which are not sorted."""


class StageOutput(NamedTuple):
    """Holds the outputs of one stage for the boxes of all images."""

    logits: Tensor
    """Class logits, (boxes, classes + 1) float32; the last class is background."""
    deltas: Tensor
    """Box regression outputs, (boxes, 4) float32; shared by all classes."""


class BoxStage(nn.Module):
    """Classifies and refines boxes with four convolutions, a linear layer and two output layers, as in ViTDet."""

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        """Builds the layers with uninitialised parameters.

        Args:
            channels: number of channels of the pyramid.
            width: output features of the linear layer.
            num_classes: number of classes, without background.
        """
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels) for _ in range(_NUM_CONVS))
        self.linear = nn.Linear(channels * _POOLED_SIDE**2, width)
        self.classes = nn.Linear(width, num_classes + 1)
        self.deltas = nn.Linear(width, 4)

    def forward(self, x_RCSS: Tensor) -> StageOutput:
        """Returns the outputs for boxes from their pooled features, (boxes, channels, side, side); there may be no
        boxes.
        """
        for conv in self.convs:
            x_RCSS = conv(x_RCSS)
        h_RD = F.relu(self.linear(x_RCSS.flatten(1)))
        return StageOutput(self.classes(h_RD).float(), self.deltas(h_RD).float())


class Cascade(nn.Module):
    """Runs three box stages; each stage refines the boxes of the previous stage.

    The backward pass scales the gradient of the pooled features by 1/3. The gradient of the feature pyramid is then as
    large as with one stage.
    """

    def __init__(self, channels: int, width: int, num_classes: int) -> None:
        """Builds the three stages with uninitialised parameters; the arguments are those of `BoxStage`."""
        super().__init__()
        self.stages = nn.ModuleList(BoxStage(channels, width, num_classes) for _ in IOUS)

    def losses(
        self,
        pyramid: Pyramid,
        sampled: Sequence[SampledBoxes],
        objects: Sequence[ImageObjects],
        sizes: Sequence[Size],
        count: int,
    ) -> Tensor:
        """Returns the class loss and the box loss, (2,) float32, each summed over images and stages.

        Both losses are divided by `count`. This divisor is constant, so the loss of an image does not depend on the
        other images of a batch.

        Args:
            pyramid: feature maps by stride.
            sampled: sampled proposals of each image (`sample_proposals`).
            objects: objects of each image.
            sizes: height and width of each image in pixels.
            count: maximum number of proposals sampled per image.
        """
        sums = []
        for stage_index, stage in enumerate(self.stages):
            boxes = [of_image.boxes for of_image in sampled]
            output = stage(self._pool(pyramid, boxes))
            sums.append(_stage_losses(output, sampled, objects, stage_index))
            if stage_index + 1 < len(IOUS):
                refined = zip(_refine(output, boxes, sizes, stage_index), objects, strict=True)
                sampled = [_match_refined(found, of_image, stage_index + 1) for found, of_image in refined]
        return torch.stack(sums).sum(0) / count

    def predict(
        self, pyramid: Pyramid, proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[tuple[Tensor, Tensor]]:
        """Returns each image's refined boxes, (boxes, 4), and their class probabilities, (boxes, classes), float32.

        The probabilities are means over the three stages.

        Args:
            pyramid: feature maps by stride.
            proposals: proposals of each image, (proposals, 4) each.
            sizes: height and width of each image in pixels.
        """
        boxes, probabilities = list(proposals), []
        for stage_index, stage in enumerate(self.stages):
            output = stage(self._pool(pyramid, boxes))
            probabilities.append(output.logits.softmax(1)[:, :-1])
            boxes = _refine(output, boxes, sizes, stage_index)
        scores = torch.stack(probabilities).mean(0).split([len(of_image) for of_image in boxes])
        return list(zip(boxes, scores, strict=True))

    def _pool(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        return scale_gradient(pool_boxes(pyramid, boxes, _POOLED_SIDE), 1 / len(IOUS))


@torch.no_grad()
def sample_proposals(
    proposals: Proposals, num_anchors: int, objects: ImageObjects, seed: Tensor, count: int
) -> SampledBoxes:
    """Samples at most `count` proposals of an image for training. The result lists positive proposals first.

    At most `count` / 4 of the sampled proposals are positive. The objects' own boxes are added to the proposals, so
    there are positive proposals from the first step on. A random number decides whether a proposal is sampled. This
    number depends only on `seed` and the index of the proposal's anchor, so the sample does not change if rounding
    changes the order of the proposals. An object's own box has no anchor; `num_anchors` plus the object's index is used
    instead.

    Args:
        proposals: proposals of the image.
        num_anchors: number of anchors of the image.
        objects: objects of the image; there may be none.
        seed: seed of the image, int64 scalar.
        count: maximum number of proposals to sample.
    """
    boxes_N4 = torch.cat([proposals.boxes, objects.boxes])
    matches_N = _match(boxes_N4, objects, 0)
    ranks = random_priorities(seed, num_anchors + len(objects.boxes), _PURPOSE)
    priorities_N = torch.cat([ranks[proposals.anchors], ranks[num_anchors:]])
    drawn = sample_balanced(matches_N >= 0, matches_N < 0, count, _POSITIVE_SHARE, priorities_N)
    indices = torch.cat(drawn)
    return SampledBoxes(boxes_N4[indices], matches_N[indices], len(drawn[0]))


def _match(boxes_N4: Tensor, objects: ImageObjects, stage: int) -> Tensor:
    return match_boxes(boxes_N4, objects.boxes, IOUS[stage], IOUS[stage])


def _match_refined(boxes_N4: Tensor, objects: ImageObjects, stage: int) -> SampledBoxes:
    """Matches refined boxes with objects; boxes without area stay, but no loss counts them."""
    matches_N = _match(boxes_N4, objects, stage)
    return SampledBoxes(boxes_N4, torch.where(has_area(boxes_N4), matches_N, IGNORED))


def _refine(output: StageOutput, boxes: Sequence[Tensor], sizes: Sequence[Size], stage: int) -> list[Tensor]:
    decoded_R4 = decode_boxes(_CODERS[stage], output.deltas.detach(), torch.cat(list(boxes) or [output.deltas]))
    of_images = decoded_R4.split([len(of_image) for of_image in boxes])
    # NaN has no pyramid level. With zeros, the box has no area.
    return [clip_boxes(of_image, size).nan_to_num() for of_image, size in zip(of_images, sizes, strict=True)]


def _stage_losses(
    output: StageOutput, sampled: Sequence[SampledBoxes], objects: Sequence[ImageObjects], stage: int
) -> Tensor:
    """Returns the class loss and the box loss of one stage, (2,), each summed over boxes.

    The class loss counts all boxes except those with match `IGNORED`. The box loss counts only positive boxes.
    """
    background = output.logits.shape[1] - 1
    labels, wanted = [output.deltas.new_empty(0).long()], [output.deltas.new_empty(0, 4)]
    for (boxes_N4, matches_N, _), of_image in zip(sampled, objects, strict=True):
        label_N = torch.where(matches_N == IGNORED, _NO_LABEL, background)
        if not len(of_image.labels):
            labels.append(label_N)
            wanted.append(boxes_N4)
            continue
        object_N = matches_N.clamp(min=0)  # boxes without an object get object 0, but their targets do not count
        labels.append(torch.where(matches_N >= 0, of_image.labels[object_N], label_N))
        wanted.append(encode_boxes(_CODERS[stage], of_image.boxes[object_N], boxes_N4))
    labels_R = torch.cat(labels)
    classes = F.cross_entropy(output.logits, labels_R, reduction="sum", ignore_index=_NO_LABEL)
    has_object_R1 = ((labels_R != background) & (labels_R != _NO_LABEL))[:, None]
    wanted_R4 = torch.where(has_object_R1, torch.cat(wanted), output.deltas.detach())
    return torch.stack([classes, F.l1_loss(output.deltas, wanted_R4, reduction="sum")])
