"""Defines the keys of the "task" section for the training of the visual tokenizer."""

from dataclasses import dataclass

from beit3_ds.config import TeacherConfig
from beit3_ds.config.numbers import Count, Weight


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerSettings(TeacherConfig):
    """Configures how the visual tokenizer learns to reconstruct its teacher's features (BEiT v2, section 2.2)."""

    commitment_weight: Weight = 1.0
    """Weight beta of the commitment loss."""
    continuous_steps: Count = 0
    """Number of initial steps without quantization, in which the decoder gets the encoder's vectors; k-means then
    initialises the codebook. BEiT v2 uses 0. A short training needs some of these steps, because at first the encoder
    changes too fast for the codebook to follow."""
