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
    head: float
    """Operations of the task's head (`Task.head_flops`)."""


def work_of(batch: PackedBatch, head: float) -> Work:
    """Returns what one micro-batch asks for, given the operations of the task's head."""
    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    squares = sum(length * length for length in lengths)
    return Work(batch.num_rows, squares, batch.patch_mask.numel(), head)


def layer_flops(config: ModelConfig, work: Work) -> list[float]:
    """Returns operations of the forward pass of each layer: embeddings, blocks, head; a multiply-add counts 2.

    Counts matrix products only, as model FLOPs utilisation is usually stated: those of the model as it is defined, of
    which `Block` leaves some out. Every row meets one expert, so all blocks cost the same.
    """
    hidden = config.hidden_size
    embeddings = 2 * work.patches * 3 * config.patch_size**2 * hidden
    block = attention_flops(config, work.rows, work.attended) + ffn_flops(config, work.rows)
    return [embeddings, *[block] * config.num_layers, work.head]


def attention_flops(config: ModelConfig, rows: float, attended: float) -> float:
    """Operations of the forward pass of one attention; `rows` and `attended` as in `Work`."""
    return 2 * rows * 4 * config.hidden_size**2 + 4 * attended * config.hidden_size


def ffn_flops(config: ModelConfig, rows: float) -> float:
    """Operations of the forward pass of one FFN."""
    return 2 * rows * 2 * config.hidden_size * config.ffn_hidden_size
