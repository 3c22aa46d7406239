"""Defines the pretraining keys of the "task" section: masking and the weights of the loss terms."""

from dataclasses import dataclass, field
from typing import Literal

from beit3_ds.config import RunConfig
from beit3_ds.config.numbers import MaskRatio, Weight


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Sets the weights of the four pretraining loss terms; each is 1 by default, because the paper gives no weights."""

    image_mim: Weight = 1.0
    """Weight of the loss on masked patches of images without text."""
    text_mlm: Weight = 1.0
    """Weight of the loss on masked tokens of texts without image."""
    pair_mim: Weight = 1.0
    """Weight of the loss on masked patches of image-text pairs."""
    pair_mlm: Weight = 1.0
    """Weight of the loss on masked caption tokens of image-text pairs."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Configures masked data modeling of images, texts and image-text pairs (paper section 2.2)."""

    image_mask_ratio: MaskRatio = 0.4
    """Share of the patches of every image that block-wise masking hides (paper: 40%)."""
    text_mask_ratio: MaskRatio = 0.15
    """Share of the tokens of a text that the model predicts (paper: 15%)."""
    pair_text_mask_ratio: MaskRatio = 0.5
    """Share of the tokens of a caption that the model predicts (paper: 50%)."""
    text_masking: Literal["token", "whole_word"] = "token"
    """Unit of masking in texts and captions: "token" as in the paper, or "whole_word" as in VLMo."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the four loss terms."""


def pretraining_config(config: RunConfig) -> PretrainingConfig:
    """Returns the pretraining settings of a run; returns the defaults if the run trains another task.

    Raises:
        ConfigError: if a key is unknown or a value is invalid.
    """
    return config.task.load(PretrainingConfig) if config.task.name == "pretraining" else PretrainingConfig()
