"""Compares the speed of this project's segmentation with transformers' Mask2Former on the same trunk and adapter."""

# B images, C classes.

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.config.dense import DenseConfig
from beit3_ds.model.vit_adapter import AdapterConfig
from beit3_ds.tasks.segmentation.config import DecoderConfig, SegmentationConfig
from beit3_ds.tasks.segmentation.head import SegmentationHead
from beit3_ds.tasks.segmentation.mask_decoder import mask2former_config, mask2former_parts
from beit3_ds.tasks.segmentation.model import SegmentationModel
from beit3_ds.tasks.segmentation.packing import label_targets, pack_windows

_SEED = 0


class SegmentationFigures(NamedTuple):
    """Holds the speed of this project's segmentation, also relative to the library `transformers`.

    All figures are medians over rounds. A ratio is the library's time divided by this project's time in the same round.
    """

    training_images_per_second: float
    """Images per second of this project's training step: forward, loss and backward."""
    inference_images_per_second: float
    """Images per second of this project's inference, which predicts the class of each pixel."""
    training_ratio: float
    """Transformers' time per training step, divided by this project's time per training step."""
    inference_ratio: float
    """Transformers' time per inference, divided by this project's time per inference."""
    trunk_share: float
    """The trunk's share of the time of this project's training step, from 0 to 1."""


def bench_config() -> tuple[ModelConfig, SegmentationConfig]:
    """Returns the configs of the compared model: a trunk of 12 layers with width 192, on crops of 256 pixels."""
    model = ModelConfig(
        num_layers=12,
        hidden_size=192,
        ffn_hidden_size=768,
        num_attention_heads=3,
        patch_size=16,
        image_size=256,
        num_vision_language_layers=0,
        inputs=("images",),
        final_norm=False,
        dense=DenseConfig(),
    )
    decoder = DecoderConfig(
        hidden_size=128, ffn_hidden_size=512, pixel_ffn_hidden_size=256, num_heads=8, num_pixel_layers=3, num_queries=50
    )
    adapter = AdapterConfig(conv_channels=32, num_heads=6)
    return model, SegmentationConfig(num_classes=20, adapter=adapter, decoder=decoder, num_points=3136)


def build_model(model: ModelConfig, settings: SegmentationConfig, device: torch.device) -> SegmentationModel:
    """Builds this project's segmentation model with initial values."""
    built = SegmentationModel(lambda config, tensor: SegmentationHead(config, tensor, settings), model)
    built.initialize(_SEED)
    return built.to(device)


class TransformersModel(nn.Module):
    """Contains transformers' Mask2Former, whose encoder is the trunk and the adapter of this project's model."""

    def __init__(self, ours: SegmentationModel, settings: SegmentationConfig) -> None:
        """Builds the model. It shares the parameters of the trunk and the adapter with `ours`."""
        super().__init__()
        parts, config = mask2former_parts(), mask2former_config(settings)
        self.whole = parts.Mask2FormerForUniversalSegmentation(config)
        pixels = self.whole.model.pixel_level_module
        channels = [ours.config.hidden_size] * 4
        pixels.encoder = _Encoder(ours, channels)
        pixels.decoder = parts.Mask2FormerPixelDecoder(config, feature_channels=channels)
        pixels.decoder.apply(self.whole._init_weights)

    def loss(self, pixels: Tensor, masks: Sequence[Tensor], classes: Sequence[Tensor]) -> Tensor:
        """Returns transformers' loss for a batch of images.

        Args:
            pixels: images.
            masks: target masks of each image.
            classes: class of each target mask, per image.
        """
        loss: Tensor = self.whole(pixels, mask_labels=list(masks), class_labels=list(classes)).loss
        return loss

    def scores(self, pixels: Tensor) -> Tensor:
        """Returns the score of each class at each pixel, (B, C, height, width), with the formula of transformers' image
        processor.
        """
        found = self.whole(pixels)
        masks = F.interpolate(found.masks_queries_logits, pixels.shape[2:], mode="bilinear", align_corners=False)
        return torch.einsum("bqc,bqhw->bchw", found.class_queries_logits.softmax(-1)[..., :-1], masks.sigmoid())


class _Encoder(nn.Module):
    def __init__(self, ours: SegmentationModel, channels: list[int]) -> None:
        super().__init__()
        self.ours, self.channels = ours, channels

    def forward(self, pixels: Tensor) -> Any:
        return SimpleNamespace(feature_maps=list(self.ours.adapted_maps(_pack(pixels, self.ours))))


def measure(rounds: int, images: int = 2, device: torch.device | None = None) -> SegmentationFigures:
    """Times training steps and inference of this project's segmentation model and transformers' Mask2Former.

    The models run in turn. The first round is not measured.

    Args:
        rounds: number of measured rounds.
        images: images per step.
        device: device to measure on; None means the CPU.
    """
    device = device or torch.device("cpu")
    config, settings = bench_config()
    ours = build_model(config, settings, device)
    theirs = TransformersModel(ours, settings).to(device)
    pixels, labels = _draw_batch(images, config.image_size, settings.num_classes, device)
    batch, factors = _labelled(pixels, labels, ours), torch.tensor([0.002, 0.5, 0.5], device=device)
    masks = [torch.stack([own == label for label in own.unique()]).float() for own in labels]
    classes = [own.unique().long() for own in labels]
    turns: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours(batch, factors).total.backward(),
        "theirs": lambda: theirs.loss(pixels, masks, classes).backward(),
        "trunk": lambda: _run_trunk(ours, batch).sum().backward(),
        "our inference": lambda: _without_gradient(lambda: ours(batch, None)),
        "their inference": lambda: _without_gradient(lambda: theirs.scores(pixels)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(rounds + 1):
        for name, turn in turns.items():
            taken = _time(turn, device)
            theirs.zero_grad()
            ours.zero_grad()
            if number:
                seconds[name].append(taken)
    return SegmentationFigures(
        training_images_per_second=images / statistics.median(seconds["ours"]),
        inference_images_per_second=images / statistics.median(seconds["our inference"]),
        training_ratio=_ratio(seconds["theirs"], seconds["ours"]),
        inference_ratio=_ratio(seconds["their inference"], seconds["our inference"]),
        trunk_share=_ratio(seconds["trunk"], seconds["ours"]),
    )


def _pack(pixels: Tensor, model: SegmentationModel) -> PackedBatch:
    return pack_windows(list(pixels), model.config.patch_size).to(pixels.device)


def _labelled(pixels: Tensor, labels: Tensor, model: SegmentationModel) -> PackedBatch:
    targets, host_targets = label_targets(labels.cpu().numpy(), range(len(labels)))
    targets = {name: target.to(pixels.device) for name, target in targets.items()}
    return dataclasses.replace(_pack(pixels, model), targets=targets, host_targets=host_targets)


def _draw_batch(images: int, size: int, num_classes: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns random pixels, and label maps that consist of 8 x 8 cells with random classes."""
    generator = torch.Generator().manual_seed(_SEED)
    pixels = torch.rand(images, 3, size, size, generator=generator) * 2 - 1
    cells = torch.randint(0, num_classes, (images, 8, 8), generator=generator, dtype=torch.uint8)
    labels = cells.repeat_interleave(size // 8, 1).repeat_interleave(size // 8, 2)
    return pixels.to(device), labels.to(device)


def _run_trunk(model: SegmentationModel, batch: PackedBatch) -> Tensor:
    assert model.embeddings is not None, "the model is whole"
    return model.run_layers(batch, model.embeddings(batch), range(1, model.config.num_layers + 1))


@torch.no_grad()
def _without_gradient(run: Callable[[], Any]) -> Any:
    return run()


def _time(turn: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds that a call takes: CPU time on a CPU, wall time on a GPU."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    start = clock()
    turn()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def _ratio(first: Sequence[float], second: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(first, second, strict=True))
