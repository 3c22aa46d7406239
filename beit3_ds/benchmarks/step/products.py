"""The model's own matrix products of one training step and nothing else: the ceiling of `beit3 bench train`."""

# T packed rows, D hidden, F ffn hidden, H heads, K head width, S rows of a sequence, M masked rows, V vocabulary.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from beit3_ds.batch import PackedBatch
from beit3_ds.config import ModelConfig
from beit3_ds.model.flops import attention_flops, ffn_flops, layer_flops, work_of


class Product(NamedTuple):
    """out = a @ b, of matrices or of batches of them."""

    a: Tensor
    b: Tensor
    out: Tensor

    @property
    def flops(self) -> int:
        """A multiply-add counts 2."""
        return 2 * self.out.numel() * self.a.shape[-1]

    def run(self) -> None:
        """Computes it, into the memory that is there."""
        (torch.mm if self.a.ndim == 2 else torch.bmm)(self.a, self.b, out=self.out)


class Layer(NamedTuple):
    """The products of a layer, in the order of its passes."""

    forward: tuple[Product, ...]
    backward: tuple[Product, ...]


class Products:
    """Every product of the model as it is defined, each once: its model FLOPs (`model.flops`).

    Among them are those that a step can do without: of branches that stochastic depth drops, and of rows after the last
    attention that no head reads. `needed_flops` leaves them out.

    Every expert multiplies its own rows; queries, keys and values are one product, as they can be; attention's products
    are made sequence by sequence, on heads that lie one after the other; the heads see masked rows only. The backward
    pass multiplies for the gradients of inputs and of weights, but not for that of the pixels, and recomputes nothing.
    All blocks of one kind share their operands: those of one block of `base` are larger than a cache.
    """

    def __init__(self, config: ModelConfig, batch: PackedBatch, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the operands.

        Args:
            config: sizes and layout.
            batch: whose rows, sequences and masked positions count.
            dtype: of the products.
            device: where they are made.
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
        """Of a step."""
        return sum(product.flops for layer in self.layers for product in (*layer.forward, *layer.backward))

    def run(self) -> None:
        """Runs forward through all layers and back."""
        for layer in self.layers:
            for product in layer.forward:
                product.run()
        for layer in reversed(self.layers):
            for product in layer.backward:
                product.run()


def needed_flops(config: ModelConfig, batch: PackedBatch) -> float:
    """Operations of a step's products without those of branches that stochastic depth drops, and without those of rows
    of the last FFN that no head reads: neither loss nor gradients depend on them.

    Args:
        config: of the model.
        batch: with the factors of stochastic depth, if there are any.
    """
    embeddings, *_, heads = layer_flops(config, work_of(batch))
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
    masked_Q = batch.row_sequence[batch.masked_rows.rows].bincount(minlength=batch.num_sequences)
    kept_Q = torch.ones(batch.num_sequences) if batch.drop_path is None else batch.drop_path[:, -1, 1] != 0
    blocks += ffn_flops(config, float((masked_Q * kept_Q).sum()))
    # Forward, and twice as much backward; pixels have no gradient.
    return 2 * embeddings + 3 * (blocks + heads)


class _Operands:
    """Makes the layers' operands, of random values: the speed of products on zeros or on garbage may differ.

    Results are written once beforehand, so that a product finds its memory there.
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
    image_mim, text_mlm, pair_mim, pair_mlm = batch.num_masked
    return _chain(
        [
            make.linear(image_mim + pair_mim, config.hidden_size, config.visual_vocab_size),
            make.linear(text_mlm + pair_mlm, config.hidden_size, config.text_vocab_size),
        ]
    )
