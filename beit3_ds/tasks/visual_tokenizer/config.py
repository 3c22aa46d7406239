"""Defines the keys of the "task" section for training the visual tokenizer."""

from dataclasses import dataclass

from beit3_ds.config import TeacherConfig
from beit3_ds.config.numbers import Count, Weight


@dataclass(frozen=True, kw_only=True)
class VisualTokenizerSettings(TeacherConfig):
    """Configures how the visual tokenizer learns to reconstruct a teacher's features (BEiT v2, section 2.2)."""

    commitment_weight: Weight = 1.0
    """Weight of the commitment loss, beta in the paper."""
    continuous_steps: Count = 0
    """Number of initial steps without quantization (BEiT v2: 0). In these steps, the decoder gets the encoder's
    vectors; afterwards, k-means initialises the codebook. A short training needs such steps, because at first the
    encoder changes too fast for the codebook."""
