"""Defines the "model.dense" section: a backbone for detection and segmentation of large images."""

from dataclasses import dataclass
from typing import Annotated

from beit3_ds.config.numbers import Range
from beit3_ds.config.strict import ConfigError


@dataclass(frozen=True, kw_only=True)
class DenseConfig:
    """Configures the backbone for dense tasks, whose images differ in size and have no CLS row."""

    window_size: Annotated[int, Range(0, 1024)] = 0
    """Patches on a side of the windows in which blocks attend (ViTDet: 14); 0 lets all blocks attend globally."""
    global_blocks: tuple[Annotated[int, Range(0, 1000)], ...] = ()
    """Indices, from 0, of the blocks that attend to the whole image although `window_size` is set. ViTDet (Li et al.,
    2022, arXiv:2203.16527, section 3) uses the last block of each quarter, e.g. [2, 5, 8, 11] of 12."""
    relative_positions: bool = False
    """Whether attention adds decomposed relative positions (Li et al., 2021, arXiv:2112.01526), which start at zero.
    Their tables cover a window, or in global blocks an image of `model.image_size`."""

    def check(self, num_layers: int) -> None:
        """Checks the blocks against the number of blocks of the model.

        Raises:
            ConfigError: if `global_blocks` names a block twice or a block that does not exist, or has no effect.
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
        """Returns the window size of block `layer` (0-based); 0 if the block attends to the whole image."""
        return 0 if layer in self.global_blocks else self.window_size
