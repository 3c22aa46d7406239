"""Floating-point operations of each layer, for utilisation and for cutting the model into stages."""

from typing import NamedTuple

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig


class Work(NamedTuple):
    """What the operations of a forward pass depend on."""

    rows: float
    """Packed rows, T."""
    attended: float
    """Pairs of rows that attend to each other: the sum of the squared lengths of all sequences."""
    patches: float
    """Patches, masked ones included."""
    masked_patches: float
    """Rows of the MIM head."""
    masked_tokens: float
    """Rows of the MLM head."""


def work_of(batch: PackedBatch) -> Work:
    """What one micro-batch asks for."""
    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    image_mim, text_mlm, pair_mim, pair_mlm = batch.num_masked
    squares = sum(length * length for length in lengths)
    return Work(batch.num_rows, squares, batch.patch_mask.numel(), image_mim + pair_mim, text_mlm + pair_mlm)


def layer_flops(config: ModelConfig, work: Work) -> list[float]:
    """Operations of the forward pass of every layer: embeddings, blocks, heads; a multiply-add counts 2.

    Counts matrix products only, as model FLOPs utilisation is usually stated: those of the model as it is defined, of
    which `Block` leaves some out. Every row meets one expert, so all blocks cost the same.
    """
    hidden = config.hidden_size
    embeddings = 2 * work.patches * 3 * config.patch_size**2 * hidden
    block = attention_flops(config, work.rows, work.attended) + ffn_flops(config, work.rows)
    heads = 2 * hidden * (work.masked_patches * config.visual_vocab_size + work.masked_tokens * config.text_vocab_size)
    return [embeddings, *[block] * config.num_layers, heads]


def attention_flops(config: ModelConfig, rows: float, attended: float) -> float:
    """Operations of the forward pass of one attention; `rows` and `attended` as in `Work`."""
    return 2 * rows * 4 * config.hidden_size**2 + 4 * attended * config.hidden_size


def ffn_flops(config: ModelConfig, rows: float) -> float:
    """Operations of the forward pass of one FFN."""
    return 2 * rows * 2 * config.hidden_size * config.ffn_hidden_size
