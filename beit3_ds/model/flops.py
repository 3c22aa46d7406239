"""Counts floating-point operations per layer, for MFU and for balancing pipeline stages."""

from typing import NamedTuple

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig


class Work(NamedTuple):
    """Holds the quantities that determine the floating-point operations of a forward pass."""

    rows: float
    """Number of packed rows (T)."""
    attended: float
    """Number of (query, key) pairs in global attention: the sum of all squared sequence lengths, minus masked (query,
    key) pairs."""
    windowed: float
    """Number of (query, key) pairs in a block with windows (`model.dense`). If the model has no windows, the value is
    that of `attended`."""
    patches: float
    """Number of patches, including masked ones."""
    head: float
    """Floating-point operations of the task's head (`Task.head_flops`)."""


def work_of(batch: PackedBatch, head: float, window_size: int = 0) -> Work:
    """Returns the `Work` of one micro-batch.

    Args:
        batch: the packed micro-batch.
        head: floating-point operations of the task's head.
        window_size: side of an attention window in patches (`ModelConfig.window_size`); 0 without windows.
    """
    attended, windowed = (
        sum(sum(stop - start for start, stop in sequence) ** 2 for sequence in batch.layout.attention_ranges(size))
        for size in (0, window_size)
    )
    if batch.causal_captions:  # images do not attend to captions, and words do not attend to later words
        image = batch.image_length
        masked = sum(image * length + length * (length - 1) // 2 for length in batch.caption_lengths)
        attended, windowed = attended - masked, windowed - masked
    return Work(batch.num_rows, attended, windowed, batch.num_patches, head)


def layer_flops(config: ModelConfig, work: Work) -> list[float]:
    """Returns the forward floating-point operations of each layer: embeddings, blocks, head.

    Counts only matrix products, as is usual for model FLOPs utilization (MFU). A multiply-add counts as two operations.
    Sequences dropped by stochastic depth are counted although `Block` may skip them, and products with relative
    positions are not counted. All blocks with equal windows cost the same, because every row uses one expert per block.
    """
    hidden = config.hidden_size
    embeddings = 2 * work.patches * 3 * config.patch_size**2 * hidden
    pairs = [work.windowed if config.block_window(layer) else work.attended for layer in range(config.num_layers)]
    ffn = ffn_flops(config, work.rows)
    return [embeddings, *(attention_flops(config, work.rows, count) + ffn for count in pairs), work.head]


def attention_flops(config: ModelConfig, rows: float, attended: float) -> float:
    """Returns the forward floating-point operations of one attention layer; for the arguments see `Work`."""
    return 2 * rows * 4 * config.hidden_size**2 + 4 * attended * config.hidden_size


def ffn_flops(config: ModelConfig, rows: float) -> float:
    """Returns the forward floating-point operations of one FFN on `rows` rows."""
    return 2 * rows * 2 * config.hidden_size * config.ffn_hidden_size
