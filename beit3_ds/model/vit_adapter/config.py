"""Defines the configuration of a ViT-Adapter."""

import itertools
from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Size


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Configures a ViT-Adapter (Chen et al., 2022, arXiv:2205.08534, section 3 and table 2)."""

    conv_channels: Size = 64
    """Number of channels C of the spatial prior's first convolutions. Later convolutions have 2 C and 4 C channels."""
    num_interactions: Positive = 4
    """Number of interactions with the ViT. Each interaction surrounds a group of the ViT's blocks: an injector before
    the group, and an extractor after it."""
    num_extra_extractors: Annotated[int, Range(0, 16)] = 2
    """Number of additional extractors after the last block."""
    num_heads: Positive = 16
    """Number of heads of the deformable attention."""
    num_points: Positive = 4
    """Number of sampling points per query, head and level."""
    value_ratio: Annotated[float, Range(0, 4, above=True)] = 0.5
    """Width of the deformable attention's values, as a fraction of the ViT's hidden size."""
    ffn_ratio: Annotated[float, Range(0, 4, above=True)] = 0.25
    """Hidden size of the extractors' FFN, as a fraction of the ViT's hidden size."""
    initial_scale: Annotated[float, Range(0, 1)] = 0.0
    """Initial factor on each injector's output. With 0, the adapter does not change the pretrained ViT at the start."""
    adds_trunk_features: bool = True
    """Whether the ViT's patch features, resized, are added to the four output maps."""

    def value_size(self, hidden_size: int) -> int:
        """Returns the total width of the deformable attention's values, over all heads."""
        return int(hidden_size * self.value_ratio)

    def check(self, hidden_size: int, num_layers: int) -> None:
        """Checks the adapter's sizes against a ViT.

        Args:
            hidden_size: hidden size of the ViT.
            num_layers: number of blocks of the ViT.

        Raises:
            ConfigError: if `num_heads` does not divide the width of the values, or there are fewer blocks than
                interactions.
        """
        if not self.value_size(hidden_size) or self.value_size(hidden_size) % self.num_heads:
            raise ConfigError(
                f"task.adapter: num_heads={self.num_heads} does not divide the width of the values, which is "
                f"value_ratio={self.value_ratio:g} times hidden_size={hidden_size}. Change one of them."
            )
        if num_layers < self.num_interactions:
            raise ConfigError(
                f"task.adapter: num_interactions={self.num_interactions} exceeds the {num_layers} blocks of the model. "
                "Lower it."
            )

    def block_ranges(self, num_layers: int) -> list[range]:
        """Returns one range of blocks (0-based) per interaction. The injector comes before the range, and the extractor
        after it.

        If the blocks cannot be divided evenly, the first interactions have one block more than the others.
        """
        each, more = divmod(num_layers, self.num_interactions)
        starts = [number * each + min(number, more) for number in range(self.num_interactions + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]
