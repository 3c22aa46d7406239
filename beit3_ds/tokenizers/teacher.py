"""Whose features the visual tokenizer learns to reconstruct."""

from typing import Protocol

import torch
from torch import Tensor

from beit3_ds.config import VisualTokenizerConfig
from beit3_ds.tokenizers.network_teacher import load_network_teacher
from beit3_ds.tokenizers.oriented_gradients import OrientedGradients


class Teacher(Protocol):
    """Describes every patch of an image; frozen, and a function of the pixels alone."""

    width: int
    """Features of one patch."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Maps (B, 3, image_size, image_size) float in [-1, 1] to (B, N, width) float32, patches row by row."""


def build_teacher(config: VisualTokenizerConfig, device: torch.device | str = "cpu") -> Teacher:
    """Builds `config.teacher` on a device.

    Raises:
        ConfigError: for a network whose library is missing, whose weights do not fit, or that has no patch features.
    """
    if config.teacher == "oriented_gradients":
        return OrientedGradients(config.patch_size)
    return load_network_teacher(config, device)


def describe_teacher(config: VisualTokenizerConfig) -> str:
    """Whose features gave the codes their meaning, in words, for files and reports."""
    if config.teacher == "oriented_gradients":
        return (
            "histograms of oriented gradients and colours, computed from the image itself: a hand-made descriptor, not "
            "a pretrained network such as BEiT v2's CLIP"
        )
    stage = f", feature map {config.teacher_stage}" if config.teacher.startswith("timm:") else ""
    weights = "its published weights" if config.teacher_weights is None else f"weights of {config.teacher_weights}"
    return f"patch features of {config.teacher}{stage}, {weights}"
