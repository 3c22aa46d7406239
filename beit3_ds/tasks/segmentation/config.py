"""Defines the keys of the "task" section for semantic segmentation."""

from dataclasses import dataclass, field
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share, Size
from beit3_ds.config.strict import PathString
from beit3_ds.model.vit_adapter import AdapterConfig

IGNORED = 255
"""Value of pixels without a class in uint8 maps of class indices."""
MAX_CLASSES = 254
"""Maximum number of classes. ADE20K's label maps store class + 1 in one byte per pixel, and 0 where a pixel has no
class. The byte 255 is not allowed."""
_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sets the sizes of Mask2Former's pixel decoder and query decoder (Cheng et al., 2022, arXiv:2112.01527)."""

    hidden_size: Size = 256
    """Hidden size of the pixel decoder and the query decoder (ViT-Adapter: 1024). Must be at least 64, and a multiple
    of 32 and of `num_heads`."""
    ffn_hidden_size: Size = 2048
    """Hidden size of the FFNs in the query decoder (ViT-Adapter: 4096)."""
    pixel_ffn_hidden_size: Size = 1024
    """Hidden size of the FFNs in the pixel decoder (ViT-Adapter: 4096)."""
    num_heads: Positive = 8
    """Number of attention heads (ViT-Adapter: 32)."""
    num_pixel_layers: Positive = 6
    """Number of layers of the pixel decoder; each applies deformable attention to three feature maps."""
    num_query_layers: Positive = 9
    """Number of layers of the query decoder. The loss covers the predictions after each layer and before the first
    layer."""
    num_queries: Positive = 100
    """Number of queries; each query predicts one mask and one class. If an image has more classes than queries, the
    loss of each decoder layer leaves out some of the image's classes."""

    def __post_init__(self) -> None:
        # GroupNorm needs two features per group, because a single feature in a map of one cell has no variance.
        if self.hidden_size < 2 * _GROUPS or self.hidden_size % _GROUPS or self.hidden_size % self.num_heads:
            raise ConfigError(
                f"task.decoder: hidden_size={self.hidden_size} must be at least {2 * _GROUPS} and a multiple of "
                f"{_GROUPS}, the groups of its norms, and of num_heads={self.num_heads}."
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Configures semantic segmentation (paper section 3.2); training crops have `model.image_size` pixels per side."""

    num_classes: Annotated[int, Range(1, MAX_CLASSES)] = 150
    """Number of classes."""
    class_names: PathString = ""
    """Text file with one class name per line, or a table like ADE20K's objectInfo150.txt. If this key is empty, the
    objectInfo150.txt of an `ade20k` source is used. If no source has this file either, classes are named by numbers."""
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    """Sizes of the ViT-Adapter. With null, the head has a simple feature pyramid instead, built from the output of
    BEiT-3."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of Mask2Former's pixel decoder and query decoder."""
    class_weight: Annotated[float, Range(0, 100)] = 2.0
    """Weight of the class term in the total loss, and in the matching of queries to target masks."""
    mask_weight: Annotated[float, Range(0, 100)] = 5.0
    """Weight of the masks' binary cross entropy in the total loss, and in the matching of queries to target masks."""
    dice_weight: Annotated[float, Range(0, 100)] = 5.0
    """Weight of the masks' dice loss in the total loss, and in the matching of queries to target masks."""
    num_points: Annotated[int, Range(4, 2**20)] = 12544
    """Number of sampled points per mask at which the loss compares predicted and target masks."""
    min_scale: Annotated[float, Range(0.01, 100)] = 0.5
    """Smallest factor of scale jitter. Factor 1 scales the shorter side of an image to the side of the crop."""
    max_scale: Annotated[float, Range(0.01, 100)] = 2.0
    """Largest factor of scale jitter."""
    max_class_share: Share = 0.75
    """Largest accepted share of one class in the labelled pixels of a crop. Up to ten crops are drawn until one is
    accepted. If none is accepted, the last crop is used."""
    distortion: bool = True
    """Whether brightness, contrast, saturation and hue of training crops change at random (SSD's photometric
    distortion)."""
    window_stride: Size = 512
    """Pixels between the starts of neighbouring sliding windows in an evaluation. A window is at most as large as a
    crop."""
    short_side: Annotated[int, Range(0, 2**18)] = 0
    """Shorter side, in pixels, of an evaluated image at scale 1; 0 uses the side of a training crop."""
    scales: tuple[Annotated[float, Range(0.05, 20)], ...] = (1.0,)
    """Scales at which every image is evaluated; the scores of all scales are averaged."""
    flips: bool = False
    """Whether an evaluation also segments the horizontally flipped image, at each scale, and averages the scores."""
    windows_per_batch: Positive = 4
    """Maximum number of windows per forward pass in an evaluation; has no effect on the metrics."""
    page_samples: Annotated[int, Range(0, 1000)] = 24
    """Number of images shown on the result page."""
    writes_predictions: bool = True
    """Whether an evaluation with result files also writes each predicted label map as a PNG file."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"task: min_scale={self.min_scale:g} exceeds max_scale={self.max_scale:g}. Lower min_scale or raise "
                "max_scale."
            )
        if not self.scales:
            raise ConfigError("task: scales=[] would evaluate no image. Name at least one scale, such as [1.0].")
