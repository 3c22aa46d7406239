"""Defines the keys of the "task" section for object detection."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share, Size
from beit3_ds.tasks.detection.suppression import Suppression, SuppressionMethod

Sides = Annotated[int, Range(1, 2**15)]


@dataclass(frozen=True, kw_only=True)
class DetectionConfig:
    """Configures object detection and instance segmentation (paper section 3.2)."""

    num_classes: Positive = 80
    """Number of categories in the annotation files (COCO: 80, Objects365: 365)."""
    masks: bool = True
    """Whether to train and predict masks. Must be false for Objects365, which has no masks."""
    pyramid_channels: Size = 256
    """Number of channels of the simple feature pyramid and of the convolutions in the heads."""
    box_width: Size = 1024
    """Output features of the linear layer in each box stage."""
    anchor_scale: Annotated[float, Range(1, 64)] = 8.0
    """Side of an anchor, divided by the stride of the anchor's pyramid level."""
    proposals_per_level: Positive = 2000
    """Maximum number of proposals per pyramid level in training, before non-maximum suppression. The anchors with the
    best scores become proposals."""
    proposals: Positive = 1000
    """Maximum number of proposals per image after non-maximum suppression. In an evaluation, this value is used instead
    of `proposals_per_level`, too."""
    sampled_anchors: Positive = 256
    """Number of anchors per image in the loss of the proposal network. At most half of this number are anchors that
    match an object. The losses of each image are divided by this number, independently of the other images of a batch.
    """
    sampled_boxes: Positive = 512
    """Maximum number of proposals per image in the loss of the box stages. At most a quarter of this number are
    proposals that match an object. The losses of the box stages are divided by `sampled_boxes`, even if an image has
    fewer proposals."""
    min_scale: Annotated[float, Range(0, 10, above=True)] = 0.1
    """Smallest factor of large-scale jitter (ViTDet: 0.1). An image is resized to fit a square whose side is the factor
    times `model.image_size`, and is then cropped to at most `model.image_size` per side."""
    max_scale: Annotated[float, Range(0, 10, above=True)] = 2.0
    """Largest factor of large-scale jitter (ViTDet: 2)."""
    suppression: SuppressionMethod = "linear"
    """Suppression of overlapping detections of one class: `linear` or `gaussian` Soft-NMS (the paper uses Soft-NMS), or
    `hard` for plain NMS."""
    suppression_iou: Share = 0.6
    """Minimum overlap (IoU) for suppression by `linear` and `hard` (EVA: 0.6)."""
    suppression_sigma: Annotated[float, Range(0, 100, above=True)] = 0.5
    """Sigma of `gaussian` suppression, which multiplies a score by exp(-IoU^2 / sigma)."""
    score_threshold: Share = 0.05
    """A box counts as a detection only if its score is above this value."""
    max_detections: Positive = 100
    """Maximum number of detections per image; COCO's metrics count 100."""
    test_sizes: tuple[Sides, ...] = ()
    """Sides of squares in pixels. An evaluation resizes each image to fit each square, which gives one view per square.
    Suppression compares the boxes of all views of an image. The mask of a detection is the mean over the views. If this
    list is empty, there is one square with side `model.image_size`."""
    test_flip: bool = False
    """Whether an evaluation also uses a horizontally flipped copy of every view."""
    shown_score: Share = 0.3
    """Minimum score of detections shown on the result page."""
    page_samples: Annotated[int, Range(0, 10_000)] = 40
    """Number of images on the result page of an evaluation."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"task: min_scale={self.min_scale:g} exceeds max_scale={self.max_scale:g}. Lower min_scale or raise "
                "max_scale; equal values resize without jitter."
            )
        if len(set(self.test_sizes)) < len(self.test_sizes):
            raise ConfigError(f"task.test_sizes={list(self.test_sizes)} names a side twice. Give each side once.")

    @property
    def num_views(self) -> int:
        """Returns the number of views per image in an evaluation."""
        return max(1, len(self.test_sizes)) * (1 + self.test_flip)

    def build_suppression(self) -> Suppression:
        """Builds the suppression of overlapping detections from the settings."""
        return Suppression(
            method=self.suppression,
            iou=self.suppression_iou,
            sigma=self.suppression_sigma,
            score_threshold=self.score_threshold,
            max_boxes=self.max_detections,
        )
