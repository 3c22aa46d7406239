"""Defines the keys of the "task" section for semantic segmentation."""

from dataclasses import dataclass, field
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Share, Size
from beit3_ds.config.strict import PathString
from beit3_ds.model.vit_adapter import AdapterConfig

IGNORED = 255
"""Value of a pixel without a class in label maps of class indices, as uint8."""
MAX_CLASSES = 254
"""Most classes: label maps are bytes, and 254 + 1 is the largest value in ADE20K's format beside `IGNORED`."""
_GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Configures Mask2Former's pixel decoder and query decoder (Cheng et al., 2022, arXiv:2112.01527)."""

    hidden_size: Size = 256
    """Width of both decoders; must be at least 64 and a multiple of 32 and of `num_heads` (ViT-Adapter:
    1024)."""
    ffn_hidden_size: Size = 2048
    """Hidden width of the FFNs of the query decoder (ViT-Adapter: 4096)."""
    pixel_ffn_hidden_size: Size = 1024
    """Hidden width of the FFNs of the pixel decoder (ViT-Adapter: 4096)."""
    num_heads: Positive = 8
    """Number of attention heads (ViT-Adapter: 32)."""
    num_pixel_layers: Positive = 6
    """Number of layers of the pixel decoder, with deformable attention over three maps."""
    num_query_layers: Positive = 9
    """Number of layers of the query decoder; the loss also counts the predictions before and between them."""
    num_queries: Positive = 100
    """Number of queries; each predicts a mask and a class. An image must not have more classes than queries."""

    def __post_init__(self) -> None:
        # A group of one feature has no variance in a map of one cell.
        if self.hidden_size < 2 * _GROUPS or self.hidden_size % _GROUPS or self.hidden_size % self.num_heads:
            raise ConfigError(
                f"task.decoder: hidden_size={self.hidden_size} must be at least {2 * _GROUPS} and a multiple of "
                f"{_GROUPS}, the groups of its norms, and of num_heads={self.num_heads}."
            )


@dataclass(frozen=True, kw_only=True)
class SegmentationConfig:
    """Configures semantic segmentation (paper section 3.2); crops have `model.image_size` pixels on a side."""

    num_classes: Annotated[int, Range(1, MAX_CLASSES)] = 150
    """Number of classes."""
    class_names: PathString = ""
    """File with the names of the classes: one per line, or in the form of ADE20K's objectInfo150.txt. Empty uses the
    objectInfo150.txt of a source of format `ade20k`; without one, classes are named by their numbers."""
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    """Sizes of the ViT-Adapter; null replaces it by a pyramid over the trunk's last rows."""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """Sizes of Mask2Former's decoders."""
    class_weight: Annotated[float, Range(0, 100)] = 2.0
    """Weight of the classes of queries in the loss and in the matching of queries with target masks."""
    mask_weight: Annotated[float, Range(0, 100)] = 5.0
    """Weight of the binary cross entropy of masks."""
    dice_weight: Annotated[float, Range(0, 100)] = 5.0
    """Weight of the dice loss of masks."""
    num_points: Annotated[int, Range(4, 2**20)] = 12544
    """Number of points per mask at which masks are compared."""
    min_scale: Annotated[float, Range(0.01, 100)] = 0.5
    """Smallest factor of scale jitter. At factor 1, the shorter side of an image has the pixels of the crop."""
    max_scale: Annotated[float, Range(0.01, 100)] = 2.0
    """Largest factor of scale jitter."""
    max_class_share: Share = 0.75
    """Largest share of a crop's labelled pixels that one class may have; up to ten crops are drawn to keep below it."""
    distortion: bool = True
    """Whether brightness, contrast, saturation and hue of training crops vary, as in SSD's photometric distortion."""
    window_stride: Size = 512
    """Pixels between the sliding windows of an evaluation; a window has at most the size of a crop."""
    short_side: Annotated[int, Range(0, 2**18)] = 0
    """Pixels on the shorter side of an evaluated image at scale 1; 0 uses the size of a crop."""
    scales: tuple[Annotated[float, Range(0.05, 20)], ...] = (1.0,)
    """Scales at which an image is evaluated; the probabilities of all scales are averaged."""
    flips: bool = False
    """Whether each scale is also evaluated with the image flipped."""
    windows_per_batch: Positive = 4
    """Most windows that the model computes at once in an evaluation. It changes neither windows nor metrics."""
    page_samples: Annotated[int, Range(0, 1000)] = 24
    """Number of images on the result page."""
    writes_predictions: bool = True
    """Whether an evaluation with result files also writes one PNG of label values per image."""

    def __post_init__(self) -> None:
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"task: min_scale={self.min_scale:g} exceeds max_scale={self.max_scale:g}. Lower the first or raise "
                "the second."
            )
        if not self.scales:
            raise ConfigError("task: scales=[] would evaluate no image. Name at least one scale, such as [1.0].")
