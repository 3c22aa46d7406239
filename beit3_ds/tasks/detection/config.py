"""Defines the keys of the "task" section for detection."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share, Size
from beit3_ds.tasks.detection.suppression import Suppression, SuppressionMethod

Sides = Annotated[int, Range(1, 2**15)]


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Configures the detection of objects and of their masks (paper, section 3.2)."""

    num_classes: Positive = 80
    """Number of categories of the annotation files, and of classes of the heads (COCO: 80, Objects365: 365)."""
    masks: bool = True
    """Whether masks are trained and predicted. Objects365 has none, so its runs set it to false."""
    pyramid_channels: Size = 256
    """Channels of the simple feature pyramid and of the heads' convolutions."""
    box_width: Size = 1024
    """Width of the linear layer in each box stage."""
    anchor_scale: Annotated[float, Range(1, 64)] = 8.0
    """Side of the anchors of a pyramid level, in strides of this level."""
    proposals_per_level: Positive = 2000
    """Best anchors of each level that become proposals in training, before non-maximum suppression."""
    proposals: Positive = 1000
    """Proposals per image after non-maximum suppression; an evaluation also considers this many anchors per level."""
    sampled_anchors: Positive = 256
    """Anchors per image that the proposal network learns from, at most half of them with an object; an image's losses
    are divided by this number, so they do not depend on the other images of a batch."""
    sampled_boxes: Positive = 512
    """Proposals per image that the box stages learn from, at most a quarter of them with an object; an image's losses
    are divided by this number."""
    min_scale: Annotated[float, Range(0, 10, above=True)] = 0.1
    """Smallest factor of large-scale jitter: an image is resized to fit a square of `model.image_size` times the
    factor, and a crop of at most `model.image_size` on a side is taken (ViTDet: 0.1)."""
    max_scale: Annotated[float, Range(0, 10, above=True)] = 2.0
    """Largest factor of large-scale jitter (ViTDet: 2)."""
    suppression: SuppressionMethod = "linear"
    """Suppression of overlapping detections of a class: Soft-NMS as the paper uses it, `linear` or `gaussian`, or
    `hard` for plain NMS."""
    suppression_iou: Share = 0.6
    """Overlap from which `linear` and `hard` suppress (EVA: 0.6)."""
    suppression_sigma: Annotated[float, Range(0, 100, above=True)] = 0.5
    """Variance of `gaussian`."""
    score_threshold: Share = 0.05
    """Score above which a box counts as a detection."""
    max_detections: Positive = 100
    """Largest number of detections per image; COCO's metric counts 100."""
    test_sizes: tuple[Sides, ...] = ()
    """Sides of the square into which an image is fitted in an evaluation, in pixels; several sides give several views,
    whose boxes compete and whose masks are averaged. Empty uses `model.image_size`."""
    test_flip: bool = False
    """Whether an evaluation also uses every view flipped from left to right."""
    shown_score: Share = 0.3
    """Score from which the page shows detections."""
    page_samples: Annotated[int, Range(0, 10_000)] = 40
    """Number of images on the page that an evaluation writes."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"task: min_scale={self.min_scale:g} exceeds max_scale={self.max_scale:g}. Lower the first or raise "
                "the second; equal values resize without jitter."
            )
        if len(set(self.test_sizes)) < len(self.test_sizes):
            raise ConfigError(f"task.test_sizes={list(self.test_sizes)} names a side twice. Give each side once.")

    @property
    def num_views(self) -> int:
        """Returns the number of views of an image in an evaluation."""
        return max(1, len(self.test_sizes)) * (1 + self.test_flip)

    def build_suppression(self) -> Suppression:
        """Builds the suppression of overlapping detections."""
        return Suppression(
            method=self.suppression,
            iou=self.suppression_iou,
            sigma=self.suppression_sigma,
            score_threshold=self.score_threshold,
            max_boxes=self.max_detections,
        )
