"""Defines the section "model.dense", which configures a backbone for detection and segmentation."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config.numbers import Range
from beit3_ds.config.strict import ConfigError


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Configures a backbone for detection and segmentation. Image sizes may differ, and there is no CLS token."""

    window_size: Annotated[int, Range(0, 1024)] = 0
    """Side of an attention window in patches (ViTDet: 14). With 0, all blocks attend globally."""
    global_blocks: tuple[Annotated[int, Range(0, 1000)], ...] = ()
    """Indices, from 0, of the blocks that attend to the whole image. All other blocks attend within windows. ViTDet
    uses the last block of each quarter, such as [2, 5, 8, 11] of 12 blocks (Li et al., 2022, arXiv:2203.16527).
    Requires `window_size`."""
    relative_positions: bool = False
    """Whether attention adds decomposed relative position biases (Li et al., 2021, arXiv:2112.01526), initialized to
    zero. In blocks with windows, the bias tables cover one window. In global blocks, the tables cover an image of size
    `model.image_size`."""

    def check(self, num_layers: int) -> None:
        """Checks `global_blocks` against the model's number of blocks.

        Args:
            num_layers: number of blocks of the model.

        Raises:
            ConfigError: if an index is repeated or out of range, or if `global_blocks` is given without `window_size`.
        """
        blocks = self.global_blocks
        if blocks and not self.window_size:
            raise ConfigError(
                f"model.dense: global_blocks={list(blocks)} has no effect, because window_size=0 makes all blocks "
                "global. Set window_size, or remove global_blocks."
            )
        if len(set(blocks)) < len(blocks) or any(not 0 <= block < num_layers for block in blocks):
            raise ConfigError(
                f"model.dense: global_blocks={list(blocks)} must name each block at most once, by its index from 0 to "
                f"num_layers - 1 = {num_layers - 1}."
            )

    def block_window(self, layer: int) -> int:
        """Returns the side of the attention windows in block `layer` (0-based) in patches, or 0 without windows."""
        return 0 if layer in self.global_blocks else self.window_size
