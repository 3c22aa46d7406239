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
    patches: float
    """Number of patches, masked ones included."""
    head: float
    """Number of operations of the task's head (`Task.head_flops`)."""


def work_of(batch: PackedBatch, head: float) -> Work:
    """Returns the `Work` of one micro-batch; `head` is the number of operations of the task's head."""
    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    attended = sum(length * length for length in lengths)
    if batch.causal_captions:  # an image does not see its caption, and a word none of the later words
        image = batch.image_length
        attended -= sum(image * length + length * (length - 1) // 2 for length in batch.caption_lengths)
    return Work(batch.num_rows, attended, batch.num_patches, head)


def layer_flops(config: ModelConfig, work: Work) -> list[float]:
    """Returns the forward operations of each layer: embeddings, blocks, head; a multiply-add counts as 2.

    Counts only matrix products, as usual for model FLOPs utilisation. Dropped sequences count too, although `Block` may
    skip them. Every row passes through one expert per block, so all blocks cost the same.
    """
    hidden = config.hidden_size
    embeddings = 2 * work.patches * 3 * config.patch_size**2 * hidden
    block = attention_flops(config, work.rows, work.attended) + ffn_flops(config, work.rows)
    return [embeddings, *[block] * config.num_layers, work.head]


def attention_flops(config: ModelConfig, rows: float, attended: float) -> float:
    """Returns the forward operations of one attention layer; `rows` and `attended` are fields of `Work`."""
    return 2 * rows * 4 * config.hidden_size**2 + 4 * attended * config.hidden_size


def ffn_flops(config: ModelConfig, rows: float) -> float:
    """Returns the forward operations of one FFN over `rows` rows."""
    return 2 * rows * 2 * config.hidden_size * config.ffn_hidden_size
