"""Predicts the mask of each object inside its box (Mask R-CNN, He et al., 2017, arXiv:1703.06870)."""

# R boxes of all images, N boxes of one image, K classes, S side of a predicted mask.

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.tasks.detection.box_masks import masks_in_boxes
from beit3_ds.tasks.detection.boxes import Pyramid, pool_boxes
from beit3_ds.tasks.detection.cascade import SampledBoxes
from beit3_ds.tasks.detection.conv_norm import ConvNorm
from beit3_ds.tasks.detection.objects import ImageObjects

PREDICTED_SIDE = 28
"""Cells per side of a predicted mask."""

_POOLED_SIDE = 14
_NUM_CONVS = 4


class MaskHead(nn.Module):
    """Predicts one mask per class for each box: four convolutions, a deconvolution and an output layer.

    Follows ViTDet (Li et al., 2022, arXiv:2203.16527).
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        """Builds the layers with uninitialised parameters.

        Args:
            channels: number of channels of the pyramid.
            num_classes: number of classes.
        """
        super().__init__()
        self.convs = nn.ModuleList(ConvNorm(channels) for _ in range(_NUM_CONVS))
        self.enlarge = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.masks = nn.Conv2d(channels, num_classes, 1)

    def forward(self, pyramid: Pyramid, boxes: Sequence[Tensor]) -> Tensor:
        """Returns the mask logits of all classes for each box, (boxes, classes, 28, 28) float32; there may be no boxes.

        Args:
            pyramid: feature maps by stride.
            boxes: boxes of each image, (N, 4) each.
        """
        x_RCSS = pool_boxes(pyramid, boxes, _POOLED_SIDE)
        for conv in self.convs:
            x_RCSS = conv(x_RCSS)
        logits: Tensor = self.masks(F.relu(self.enlarge(x_RCSS))).float()
        return logits

    def losses(self, pyramid: Pyramid, sampled: Sequence[SampledBoxes], objects: Sequence[ImageObjects]) -> Tensor:
        """Returns the mask loss, averaged over the positive boxes of an image and summed over images, float32 scalar.

        An image without positive boxes adds 0. For each box, only the mask of the object's class counts.

        Args:
            pyramid: feature maps by stride.
            sampled: sampled proposals of each image.
            objects: objects of each image, with masks.
        """
        positive = [SampledBoxes(boxes[:number], matches[:number]) for boxes, matches, number in sampled]
        logits = self(pyramid, [of_image.boxes for of_image in positive])
        sums = [logits.sum() * 0]
        parts = logits.split([len(of_image.matches) for of_image in positive])
        for logits_NKSS, (boxes_N4, matches_N, _), of_image in zip(parts, positive, objects, strict=True):
            if not len(matches_N):
                continue
            own = torch.arange(len(matches_N), device=logits.device)
            logits_NSS = logits_NKSS[own, of_image.labels[matches_N]]
            truth_NSS = masks_in_boxes(
                of_image.masks[matches_N], of_image.boxes[matches_N], boxes_N4, PREDICTED_SIDE
            ).float()
            sums.append(F.binary_cross_entropy_with_logits(logits_NSS, truth_NSS))
        return torch.stack(sums).sum()

    def predict(self, pyramid: Pyramid, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
        """Returns, per image, the probability that each cell of a box belongs to the object, (N, 28, 28) float32.

        Args:
            pyramid: feature maps by stride.
            boxes: boxes of each image, (N, 4) each.
            labels: category label of each box, (N,) int64 per image.
        """
        logits = self(pyramid, boxes)
        parts = logits.split([len(of_image) for of_image in boxes])
        return [
            part[torch.arange(len(part), device=part.device), label_N].sigmoid()
            for part, label_N in zip(parts, labels, strict=True)
        ]
