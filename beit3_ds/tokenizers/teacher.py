"""Builds teachers, which compute the image features that the visual tokenizer learns to reconstruct."""

from typing import Protocol

import torch
from torch import Tensor

from beit3_ds.config import TeacherConfig, VisualTokenizerConfig
from beit3_ds.tokenizers.network_teacher import load_network_teacher
from beit3_ds.tokenizers.oriented_gradients import OrientedGradients


class Teacher(Protocol):
    """Interface of a teacher, which computes fixed features of every image patch."""

    width: int
    """Number of features per patch."""

    def to(self, device: torch.device) -> None:
        """Moves the teacher to a device."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Returns the features of every patch, (images, patches, width) float32, with patches in row-major order.

        Args:
            pixels: images, (images, 3, image_size, image_size) float in [-1, 1].
        """


def build_teacher(config: TeacherConfig, visual: VisualTokenizerConfig, device: torch.device | str = "cpu") -> Teacher:
    """Builds the teacher named by `config.teacher`.

    Args:
        config: settings of the teacher.
        visual: settings of the visual tokenizer, which determine the patches.
        device: device of the teacher.

    Raises:
        ConfigError: if the teacher's library is missing, if the weights do not fit, or if the network has no patch
            features.
    """
    if config.teacher == "oriented_gradients":
        return OrientedGradients(visual.patch_size)
    return load_network_teacher(config, visual.grid_size, device)


def describe_teacher(config: TeacherConfig) -> str:
    """Describes a teacher in words, for tokenizer files and reports."""
    if config.teacher == "oriented_gradients":
        return (
            "histograms of oriented gradients and colours, computed from the image itself: a hand-made descriptor, not "
            "a pretrained network such as BEiT v2's CLIP"
        )
    stage = f", feature map {config.teacher_stage}" if config.teacher.startswith("timm:") else ""
    weights = "its published weights" if config.teacher_weights is None else f"weights of {config.teacher_weights}"
    return f"patch features of {config.teacher}{stage}, {weights}"
