"""Defines the keys of the "task" section for pretraining: masking and the weights of the loss terms."""

from dataclasses import dataclass, field
from typing import Literal

from beit3_ds.config import RunConfig
from beit3_ds.config.numbers import MaskRatio, Weight


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Sets the weights of the four loss terms; the paper gives no weights, so each is 1 by default."""

    image_mim: Weight = 1.0
    """Weight of the loss on masked patches of images."""
    text_mlm: Weight = 1.0
    """Weight of the loss on masked tokens of texts."""
    pair_mim: Weight = 1.0
    """Weight of the loss on masked patches of pairs."""
    pair_mlm: Weight = 1.0
    """Weight of the loss on masked tokens of captions."""


@dataclass(frozen=True, kw_only=True)
class PretrainingConfig:
    """Configures masked modeling of images, texts and pairs (paper section 2.2)."""

    image_mask_ratio: MaskRatio = 0.4
    """Exact share of an image's patches that block-wise masking hides (paper: 40%)."""
    text_mask_ratio: MaskRatio = 0.15
    """Share of a text's tokens that are predicted (paper: 15%)."""
    pair_text_mask_ratio: MaskRatio = 0.5
    """Share of a caption's tokens that are predicted (paper: 50%)."""
    text_masking: Literal["token", "whole_word"] = "token"
    """Unit of masking in texts and captions: single tokens, as in the paper, or whole words, as in VLMo."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the four loss terms."""


def pretraining_config(config: RunConfig) -> PretrainingConfig:
    """Returns the pretraining settings of a run, or the default settings if the run has another task.

    Raises:
        ConfigError: if a key is unknown or a value is invalid.
    """
    return config.task.load(PretrainingConfig) if config.task.name == "pretraining" else PretrainingConfig()
