"""Compares this project's detector with torchvision's Mask R-CNN on the same trunk, in CPU time."""

# B images, T patches of all images, D hidden.

import dataclasses
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.data.packing import pack_grids
from beit3_ds.model import BEiT3, TaskModel
from beit3_ds.model.dense.canvas import to_canvas
from beit3_ds.model.dense.pyramid import SimpleFeaturePyramid
from beit3_ds.model.initialization import initialize_parameters
from beit3_ds.tasks.detection.box_masks import MASK_SIDE
from beit3_ds.tasks.detection.config import DetectionConfig
from beit3_ds.tasks.detection.head import DetectionHead
from beit3_ds.tasks.detection.objects import ImageObjects
from beit3_ds.tasks.detection.packing import pack
from beit3_ds.tasks.detection.samples import DetectionSample
from beit3_ds.tasks.detection.views import View

_NUM_CLASSES, _CHANNELS, _OBJECTS = 20, 64, 5
_PROPOSALS, _SAMPLED_BOXES = 200, 128


def measure_detection(rounds: int = 3, pixels: int = 256, num_images: int = 2) -> dict[str, Any]:
    """Times training steps (forward and backward) and inference of this project's detector and torchvision's Mask
    R-CNN.

    The detectors run in turn. Both have a trunk of 4 layers with width 192 and the same feature pyramid. They also have
    the same number of proposals, and four convolutions per head. This project's detector has three box stages, and
    torchvision's has one.

    Args:
        rounds: measurements per detector; the result is the median.
        pixels: height and width of the images in pixels.
        num_images: images per batch.

    Returns:
        Images per CPU second: for training and inference of each detector, and for training of this project's trunk
            alone. `trunk_share_training` is the trunk's share of the time of this project's training step.
            `images_per_second_detection` has the same value as the entry for training with this project's detector.
    """
    torch.manual_seed(0)
    config = ModelConfig(
        num_layers=4,
        hidden_size=192,
        ffn_hidden_size=768,
        num_attention_heads=3,
        patch_size=16,
        image_size=pixels,
        num_vision_language_layers=0,
        inputs=("images",),
        dense=DenseConfig(window_size=14, global_blocks=(1, 3)),
    )
    samples = [_draw_sample(number, pixels) for number in range(num_images)]
    ours, theirs = _Ours(config, samples), _Torchvision(config, samples)
    uses: dict[str, Callable[[], object]] = {
        "training": ours.train,
        "inference": ours.detect,
        "torchvision_training": theirs.train,
        "torchvision_inference": theirs.detect,
        "trunk_training": ours.train_trunk,
    }
    seconds: dict[str, list[float]] = {use: [] for use in uses}
    for number in range(rounds + 1):  # the first round warms up
        for use, run in uses.items():
            start = time.process_time()
            run()
            if number:
                seconds[use].append(time.process_time() - start)
    medians = {use: statistics.median(times) for use, times in seconds.items()}
    rates = {f"images_per_cpu_second_{use}": num_images / value for use, value in medians.items()}
    return rates | {
        "trunk_share_training": medians["trunk_training"] / medians["training"],
        "images_per_second_detection": num_images / medians["training"],
    }


def _draw_sample(number: int, pixels: int) -> DetectionSample:
    draws = torch.Generator().manual_seed(number)
    corners = torch.rand(_OBJECTS, 2, generator=draws) * pixels * 0.5
    extents = pixels * (0.1 + 0.35 * torch.rand(_OBJECTS, 2, generator=draws))
    disk = torch.linspace(-1, 1, MASK_SIDE) ** 2
    masks = (disk[:, None] + disk < 1).to(torch.uint8).expand(_OBJECTS, -1, -1)
    labels = torch.randint(0, _NUM_CLASSES, (_OBJECTS,), generator=draws)
    objects = ImageObjects(torch.cat([corners, corners + extents], 1), labels, masks)
    view = torch.randn(3, pixels, pixels, generator=draws)
    return DetectionSample(name=f"image {number}", sample_index=number, pixels=[view], seed=number, objects=objects)


class _Ours:
    """Holds this project's detector and the batches for this detector."""

    def __init__(self, config: ModelConfig, samples: list[DetectionSample]) -> None:
        settings = DetectionConfig(
            num_classes=_NUM_CLASSES,
            pyramid_channels=_CHANNELS,
            sampled_boxes=_SAMPLED_BOXES,
            proposals_per_level=2 * _PROPOSALS,
            proposals=_PROPOSALS,
        )
        self.model = TaskModel(lambda sizes, tensor: DetectionHead(sizes, settings, _NUM_CLASSES, tensor), config)
        self.model.initialize(1)
        size = (config.image_size, config.image_size)
        views = [dataclasses.replace(sample, views=[View(0, size, size, False)]) for sample in samples]
        packed = {"model": config, "num_terms": 5, "embeds": True}
        self.training, self.inference = (pack(own, None, {}, **packed) for own in (samples, views))  # type: ignore[arg-type]

    def train(self) -> None:
        self.model(self.training, torch.ones(5) / self.training.num_images).total.backward()

    def train_trunk(self) -> None:
        self.model.run_layers(self.training).sum().backward()

    @torch.no_grad()
    def detect(self) -> object:
        return self.model(self.inference, None)


class _Backbone(nn.Module):
    """Wraps the trunk and the feature pyramid for torchvision; takes images of one size."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.dense is not None, "the trunk takes images of any size"
        self.out_channels, self._window_size = _CHANNELS, config.dense.window_size
        self.trunk, self.pyramid = BEiT3(config), SimpleFeaturePyramid(config.hidden_size, _CHANNELS)
        self._patch_size = config.patch_size
        initialize_parameters(self.trunk, config, 1)

    def forward(self, pixels_BCHW: Tensor) -> "OrderedDict[str, Tensor]":
        batch: PackedBatch = pack_grids(list(pixels_BCHW), self._patch_size)
        rows_TD = self.trunk(batch)
        return self.pyramid(to_canvas(rows_TD, batch.image_grids, self._window_size))


class _Torchvision:
    """Holds torchvision's Mask R-CNN, and the images and targets of one batch. The detector's heads are as deep as
    ViTDet's.
    """

    def __init__(self, config: ModelConfig, samples: list[DetectionSample]) -> None:
        pixels, backbone = config.image_size, _Backbone(config)
        strides = backbone.pyramid.strides.values()
        self.model = MaskRCNN(
            backbone,
            **{"min_size": pixels, "max_size": pixels, "image_mean": [0.0] * 3, "image_std": [1.0] * 3},
            rpn_anchor_generator=AnchorGenerator(tuple((8 * stride,) for stride in strides), ((0.5, 1, 2),) * 5),
            rpn_head=RPNHead(_CHANNELS, 3, conv_depth=2),
            **{"rpn_pre_nms_top_n_train": 2 * _PROPOSALS, "rpn_pre_nms_top_n_test": _PROPOSALS},
            **{"rpn_post_nms_top_n_train": _PROPOSALS, "rpn_post_nms_top_n_test": _PROPOSALS},
            box_batch_size_per_image=_SAMPLED_BOXES,
            **{"box_roi_pool": _pooling(7), "mask_roi_pool": _pooling(14)},
            box_head=FastRCNNConvFCHead((_CHANNELS, 7, 7), [_CHANNELS] * 4, [1024], LayerNorm2d),
            box_predictor=FastRCNNPredictor(1024, _NUM_CLASSES + 1),
            mask_head=MaskRCNNHeads(_CHANNELS, [_CHANNELS] * 4, 1, LayerNorm2d),
            mask_predictor=MaskRCNNPredictor(_CHANNELS, _CHANNELS, _NUM_CLASSES + 1),
        )
        self.images = [sample.pixels[0] for sample in samples]
        self.targets = [_targets(sample, pixels) for sample in samples]

    def train(self) -> None:
        self.model.train()
        losses = self.model(self.images, self.targets)
        sum(losses.values()).backward()

    @torch.no_grad()
    def detect(self) -> object:
        self.model.eval()
        return self.model(self.images)


def _pooling(side: int) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign([name for name in SimpleFeaturePyramid.strides if name != "pool"], side, 2)


def _targets(sample: DetectionSample, pixels: int) -> dict[str, Tensor]:
    """Converts a sample's objects to torchvision's format, with masks of the whole image. Label 0 is the background."""
    assert sample.objects is not None, "a sample for training"
    boxes, labels, _ = sample.objects
    masks = torch.zeros(len(labels), pixels, pixels, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    return {"boxes": boxes, "labels": labels + 1, "masks": masks}
