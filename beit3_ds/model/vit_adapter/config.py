"""Defines the sizes of a ViT-Adapter."""

import itertools
from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config import ConfigError
from beit3_ds.config.numbers import Positive, Range, Size


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Configures a ViT-Adapter (Chen et al., 2022, arXiv:2205.08534, section 3 and table 2)."""

    conv_channels: Size = 64
    """Channels C of the spatial prior's first convolutions. Its later convolutions have 2 C, then 4 C channels."""
    num_interactions: Positive = 4
    """Number of interactions with the trunk; each is before and after an equal share of the blocks."""
    num_extra_extractors: Annotated[int, Range(0, 16)] = 2
    """Number of further extractors after the last block."""
    num_heads: Positive = 16
    """Number of heads of the deformable attention."""
    num_points: Positive = 4
    """Number of sampled points per query, head and level."""
    value_ratio: Annotated[float, Range(0, 4, above=True)] = 0.5
    """Width of the deformable attention's values, divided by the hidden size."""
    ffn_ratio: Annotated[float, Range(0, 4, above=True)] = 0.25
    """Hidden width of the extractors' FFN, divided by the hidden size."""
    initial_scale: Annotated[float, Range(0, 1)] = 0.0
    """Initial value of the factor of each injector's output; 0 leaves the pretrained trunk unchanged at the start."""
    adds_trunk_features: bool = True
    """Whether the trunk's own rows, resized, are added to the four output maps."""

    def value_size(self, hidden_size: int) -> int:
        """Returns the width of the values of all heads."""
        return int(hidden_size * self.value_ratio)

    def check(self, hidden_size: int, num_layers: int) -> None:
        """Checks that the sizes fit a trunk.

        Raises:
            ConfigError: if heads do not divide the width of the values, or there are fewer blocks than interactions.
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
        """Returns the blocks between the injector and the extractor of each interaction, as numbers from 0.

        If the interactions do not divide the blocks, earlier interactions have one block more than later ones.
        """
        each, more = divmod(num_layers, self.num_interactions)
        starts = [number * each + min(number, more) for number in range(self.num_interactions + 1)]
        return [range(start, stop) for start, stop in itertools.pairwise(starts)]
