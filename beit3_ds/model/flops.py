"""Counts floating-point operations per layer, to compute MFU and to cut the model into pipeline stages."""

from typing import NamedTuple

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig


class Work(NamedTuple):
    """Holds the sizes that determine the number of operations of a forward pass."""

    rows: float
    """Number of packed rows, T."""
    attended: float
    """Number of (query, key) pairs: the sum of the squared lengths of all sequences, minus masked pairs."""
    windowed: float
    """Number of (query, key) pairs in blocks with windows (`model.dense`); equal to `attended` without windows."""
    patches: float
    """Number of patches, masked ones included."""
    head: float
    """Number of operations of the task's head (`Task.head_flops`)."""


def work_of(batch: PackedBatch, head: float, window_size: int = 0) -> Work:
    """Returns the `Work` of one micro-batch.

    Args:
        batch: the micro-batch.
        head: number of operations of the task's head.
        window_size: `ModelConfig.window_size`.
    """
    attended, windowed = (
        sum(sum(stop - start for start, stop in sequence) ** 2 for sequence in batch.layout.attention_ranges(size))
        for size in (0, window_size)
    )
    if batch.causal_captions:  # an image does not see its caption, and a word none of the later words
        image = batch.image_length
        masked = sum(image * length + length * (length - 1) // 2 for length in batch.caption_lengths)
        attended, windowed = attended - masked, windowed - masked
    return Work(batch.num_rows, attended, windowed, batch.num_patches, head)


def layer_flops(config: ModelConfig, work: Work) -> list[float]:
    """Returns the forward operations of each layer: embeddings, blocks, head; a multiply-add counts as 2.

    Counts only matrix products, as usual for model FLOPs utilisation. Dropped sequences count too, although `Block` may
    skip them. Every row passes through one expert per block, so all blocks with equal windows cost the same. Products
    of relative positions do not count.
    """
    hidden = config.hidden_size
    embeddings = 2 * work.patches * 3 * config.patch_size**2 * hidden
    pairs = [work.windowed if config.block_window(layer) else work.attended for layer in range(config.num_layers)]
    ffn = ffn_flops(config, work.rows)
    return [embeddings, *(attention_flops(config, work.rows, count) + ffn for count in pairs), work.head]


def attention_flops(config: ModelConfig, rows: float, attended: float) -> float:
    """Returns the forward operations of one attention layer; `rows` and `attended` are fields of `Work`."""
    return 2 * rows * 4 * config.hidden_size**2 + 4 * attended * config.hidden_size


def ffn_flops(config: ModelConfig, rows: float) -> float:
    """Returns the forward operations of one FFN over `rows` rows."""
    return 2 * rows * 2 * config.hidden_size * config.ffn_hidden_size
