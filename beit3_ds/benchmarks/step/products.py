"""Computes only the matrix products of a training step. Their time in `beit3 bench train` is a lower limit for the time
of a step.
"""

# T packed rows, D hidden, F ffn hidden, H heads, K head dim, S rows of a sequence, M masked rows, V vocabulary.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.flops import attention_flops, ffn_flops, layer_flops, work_of
from beit3_ds.tasks.pretraining.heads import head_flops


class Product(NamedTuple):
    """Describes one matrix product out = a @ b, or a batch of matrix products."""

    a: Tensor
    b: Tensor
    out: Tensor

    @property
    def flops(self) -> int:
        """Returns the FLOPs. A multiply-add counts as 2."""
        return 2 * self.out.numel() * self.a.shape[-1]

    def run(self) -> None:
        """Computes the product and stores it in `out`."""
        (torch.mm if self.a.ndim == 2 else torch.bmm)(self.a, self.b, out=self.out)


class Layer(NamedTuple):
    """Lists the matrix products of a layer's forward pass and of its backward pass, in order."""

    forward: tuple[Product, ...]
    backward: tuple[Product, ...]


class Products:
    """Lists all matrix products of one training step. The products' total FLOPs are the model FLOPs.

    The list includes rows that a step can skip, because no head reads them or stochastic depth drops them
    (`needed_flops`).

    Each expert multiplies its own rows. Queries, keys and values are one product. Attention is computed sequence by
    sequence. The heads compute masked rows only. The backward pass computes the gradients of weights and inputs, except
    for pixels, and recomputes nothing. The constructor allocates the tensors to multiply; blocks with the same experts
    use the same tensors.
    """

    def __init__(self, config: ModelConfig, batch: PackedBatch, dtype: torch.dtype, device: torch.device) -> None:
        """Allocates the operands of all products.

        Args:
            config: sizes and layout of the model.
            batch: batch whose rows, sequences and masked positions determine the shapes.
            dtype: dtype of the products.
            device: device of the products.
        """
        make = _Operands(dtype, device)
        kinds = dict.fromkeys(config.experts(layer) for layer in range(config.num_layers))
        blocks = {experts: _block(make, config, batch, experts) for experts in kinds}
        self.layers = [
            _embeddings(make, config, batch),
            *(blocks[config.experts(layer)] for layer in range(config.num_layers)),
            _heads(make, config, batch),
        ]

    @property
    def flops(self) -> int:
        """Returns the FLOPs per step."""
        return sum(product.flops for layer in self.layers for product in (*layer.forward, *layer.backward))

    def run(self) -> None:
        """Computes the products of all layers: first the forward pass, then the backward pass."""
        for layer in self.layers:
            for product in layer.forward:
                product.run()
        for layer in reversed(self.layers):
            for product in layer.backward:
                product.run()


def needed_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """Returns the minimum FLOPs of a training step's matrix products.

    Rows that stochastic depth drops, and rows of the last FFN that no head reads, are excluded.

    Args:
        config: config of the model.
        batch: batch whose operations are counted; may contain factors of stochastic depth.
    """
    embeddings, *_, heads = layer_flops(config, work_of(batch, head_flops(config, batch.term_counts)))
    blocks = 0.0
    for layer in range(config.num_layers):
        attention, ffn = (
            batch.layout if batch.drop_path is None else batch.kept_sequences(layer, branch).layout
            for branch in range(2)
        )
        lengths = [sum(stop - start for start, stop in ranges) for ranges in attention.sequence_ranges]
        blocks += attention_flops(config, attention.num_rows, sum(length * length for length in lengths))
        if layer < config.num_layers - 1:
            blocks += ffn_flops(config, ffn.num_rows)
    masked_Q = batch.row_sequence[batch.head_rows].bincount(minlength=batch.num_sequences)
    kept_Q = torch.ones(batch.num_sequences) if batch.drop_path is None else batch.drop_path[:, -1, 1] != 0
    blocks += ffn_flops(config, float((masked_Q * kept_Q).sum()))
    # The backward pass has twice the products of the forward pass, except for pixels, which have no gradient.
    return 2 * embeddings + 3 * (blocks + heads)


class _Operands:
    """Allocates the operands and results of products.

    All tensors are written once, so that the system has mapped their memory before the measurement.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int) -> Tensor:
        return torch.rand(shape, dtype=self.dtype, device=self.device)

    def linear(self, rows: int, inputs: int, outputs: int, *, input_gradient: bool = True) -> Layer:
        x, w, y = self(rows, inputs), self(outputs, inputs), self(rows, outputs)  # y serves as its own gradient
        weight_gradient = Product(y.t(), x, torch.zeros_like(w))
        dx = (Product(y, w, torch.zeros_like(x)),) if input_gradient else ()
        return Layer((Product(x, w.t(), y),), (*dx, weight_gradient))

    def attention(self, heads: int, length: int, width: int) -> Layer:
        q, k, v, y = (self(heads, length, width) for _ in range(4))
        p, dp = (self(heads, length, length) for _ in range(2))
        dq, dk, dv = (torch.zeros_like(q) for _ in range(3))
        backward = Product(p.mT, y, dv), Product(y, v.mT, dp), Product(dp, k, dq), Product(dp.mT, q, dk)
        return Layer((Product(q, k.mT, p), Product(p, v, y)), backward)


def _chain(layers: Sequence[Layer]) -> Layer:
    forward = tuple(product for layer in layers for product in layer.forward)
    return Layer(forward, tuple(product for layer in reversed(layers) for product in layer.backward))


def _embeddings(make: _Operands, config: ModelConfig, batch: PackedBatch) -> Layer:
    patches, pixels = batch.patch_mask.numel(), 3 * config.patch_size**2
    return make.linear(patches, pixels, config.hidden_size, input_gradient=False)


def _block(make: _Operands, config: ModelConfig, batch: PackedBatch, experts: tuple[str, ...]) -> Layer:
    hidden, ffn_hidden = config.hidden_size, config.ffn_hidden_size

    def linear(experts: tuple[str, ...], inputs: int, outputs: int) -> list[Layer]:
        rows = [stop - start for start, stop in batch.expert_slices(experts)]
        return [make.linear(number, inputs, outputs) for number in rows if number]

    lengths = [sum(stop - start for start, stop in ranges) for ranges in batch.sequence_ranges]
    return _chain(
        [
            *linear(config.attention_experts, hidden, 3 * hidden),
            *(make.attention(config.num_attention_heads, length, config.head_size) for length in lengths),
            *linear(config.attention_experts, hidden, hidden),
            *linear(experts, hidden, ffn_hidden),
            *linear(experts, ffn_hidden, hidden),
        ]
    )


def _heads(make: _Operands, config: ModelConfig, batch: PackedBatch) -> Layer:
    image_mim, text_mlm, pair_mim, pair_mlm = batch.term_counts
    return _chain(
        [
            make.linear(image_mim + pair_mim, config.hidden_size, config.visual_vocab_size),
            make.linear(text_mlm + pair_mlm, config.hidden_size, config.text_vocab_size),
        ]
    )
