"""Models the GPU time of each op of a block, forward and backward. There are two models: for the current code, and for
the code before optimization.

Before the optimization, each op has one Triton kernel, without alternatives. Queries, keys and values are three
products. For weight gradients, each Triton program sums over all rows of an expert. The norms of sub-LN are computed
inside the output projections. With the current code, each matrix product uses the faster of this project's kernel and
cuBLAS.
"""

# T packed rows, D hidden, F ffn hidden.

from collections.abc import Iterator
from typing import NamedTuple

from beit3_ds.benchmarks.modelled.rates import Rates
from beit3_ds.kernels.triton.architecture import NUM_MULTIPROCESSORS

_TILE = 128
_SIZE = 2
"""Bytes per element of activations and gradients in half precision."""


class BlockShape(NamedTuple):
    """Holds the sizes of one block and of its input."""

    rows: float
    """Number of packed rows T."""
    attended: float
    """Number of (query, key) pairs that attention computes, summed over sequences."""
    hidden: int
    """Hidden size D."""
    ffn_hidden: int
    """Hidden size F of the FFN."""
    sub_layernorm: bool
    """Whether the block has sub-LN: a norm before each output projection."""
    stream_size: int = 2
    """Bytes per element of the residual stream."""
    attention_lengths: tuple[float, ...] = (1.0,)
    """Length of each attention expert's row range, as a fraction of all rows, from 0 to 1. By default, one expert
    computes all rows."""
    ffn_lengths: tuple[float, ...] = (0.8, 0.2)
    """Length of each FFN expert's row range, as a fraction of all rows, from 0 to 1."""


class OpTime(NamedTuple):
    """Holds two modelled times of one op: before the project's code was optimized, and with the current code."""

    name: str
    """Name of the op."""
    before: float
    """Seconds of the op before the project's code was optimized."""
    now: float
    """Seconds of the op with the current code."""


def block_times(rates: Rates, shape: BlockShape) -> list[OpTime]:
    """Returns the modelled times of all ops of one block: first the forward pass, then the backward pass."""
    return [*_forward(rates, shape), *_backward(rates, shape)]


def _forward(rates: Rates, shape: BlockShape) -> Iterator[OpTime]:
    rows, hidden, wide = shape.rows, shape.hidden, shape.ffn_hidden
    stream, narrow = rows * hidden * shape.stream_size, rows * hidden * _SIZE
    norms = 2 * rates.pass_seconds(stream + narrow)
    yield OpTime("norms", norms, norms)
    square = 2 * rows * hidden**2
    yield OpTime("queries, keys, values", *_products(rates, 3 * square))
    attention = rates.product_seconds(4 * shape.attended * hidden, rates.attention_forward)
    yield OpTime("attention", attention, attention)
    yield _out_projection("attention's output", rates, shape, hidden, gelu=False)
    up = 2 * rows * hidden * wide
    fused = rates.product_seconds(up, rates.with_gelu)
    _, fastest = _products(rates, up)
    gelu = rates.pass_seconds(2 * rows * wide * _SIZE)
    yield OpTime("FFN up", fused, fastest if shape.sub_layernorm else min(fused, fastest + gelu))
    yield _out_projection("FFN down", rates, shape, wide, gelu=True)


def _out_projection(name: str, rates: Rates, shape: BlockShape, width: int, *, gelu: bool) -> OpTime:
    """Returns the modelled times of an output projection: before the project's code was optimized, and with the current
    code.

    `OpTime.before` is the time of this project's kernel. `OpTime.now` is the time of cuBLAS or of this project's
    kernel, whichever is faster. Both times include the sub-LN before the projection (with one exception, see `gelu`),
    and the addition of the residual after the projection. This project's kernel adds the residual to the product. With
    cuBLAS, a separate pass adds the residual.

    Args:
        name: name of the op.
        rates: assumed rates of kernels.
        shape: sizes of the block. If `shape.sub_layernorm` is False, no sub-LN is computed.
        width: input width of the projection.
        gelu: whether the input is the output of GELU, as in the FFN. If True, `OpTime.before` does not include the
            statistics of the sub-LN, because the kernel of the up projection computed them in the old code.
            `OpTime.now` does not depend on this argument.
    """
    flops, stream = 2 * shape.rows * width * shape.hidden, shape.rows * shape.hidden * shape.stream_size
    joined = rates.pass_seconds(2 * stream + shape.rows * shape.hidden * _SIZE)
    triton = rates.product_seconds(flops, rates.triton)
    now = min(triton, rates.product_seconds(flops, rates.library) + joined)
    if not shape.sub_layernorm:
        return OpTime(name, triton, now)
    rows = shape.rows * width * _SIZE
    statistics = 0 if gelu else rates.pass_seconds(rows)  # the up projection computed them for GELU
    return OpTime(name, statistics + rates.product_seconds(flops, rates.with_norm), now + rates.pass_seconds(2 * rows))


def _backward(rates: Rates, shape: BlockShape) -> Iterator[OpTime]:
    rows, hidden, wide = shape.rows, shape.hidden, shape.ffn_hidden
    stream, narrow = rows * hidden * shape.stream_size, rows * hidden * _SIZE
    norms = 2 * rates.pass_seconds(3 * stream + narrow)
    yield OpTime("norms, backward", norms, norms)
    square = 2 * rows * hidden**2
    triton, library = (rates.product_seconds(3 * square, share) for share in (rates.triton, rates.library))
    sums = rates.pass_seconds(2 * 3 * narrow)
    now = min(triton, library + rates.pass_seconds(2 * 2 * narrow))
    yield OpTime("queries, keys, values: input", triton + sums, now)
    experts = shape.attention_lengths
    yield _weight_gradient("queries, keys, values: weights", rates, shape.rows, hidden, hidden, 3, experts)
    attended = 10 * shape.attended * hidden
    own, library = (
        rates.product_seconds(attended, share) for share in (rates.own_attention_backward, rates.attention_backward)
    )
    yield OpTime("attention, backward", own, min(own, library))
    for name, width, gelu, experts in (
        ("attention's output", hidden, False, shape.attention_lengths),
        ("FFN down", wide, True, shape.ffn_lengths),
    ):
        yield OpTime(f"{name}: input", *_products(rates, 2 * rows * width * hidden))
        yield _weight_gradient(f"{name}: weights", rates, rows, hidden, width, 1, experts)
        # For the recomputation of GELU, and for its gradient.
        passes = (7, 5) if shape.sub_layernorm else ((5, 5) if gelu else (0, 0))
        before, now = (rates.pass_seconds(number * rows * width * _SIZE) for number in passes)
        yield OpTime(f"{name}: activation and norm", before, now)
    yield OpTime("FFN up: input", *_products(rates, 2 * rows * hidden * wide))
    up = _weight_gradient("FFN up: weights", rates, rows, wide, hidden, 1, shape.ffn_lengths)
    zeros = rates.pass_seconds(rows * wide * _SIZE)  # autograd wrote a gradient of zeros for the activation
    yield up._replace(before=up.before + zeros)


def _products(rates: Rates, flops: float) -> tuple[float, float]:
    """Returns the seconds of a matrix product with our kernel, and the seconds with the faster of our kernel and
    cuBLAS.
    """
    triton, library = (rates.product_seconds(flops, share) for share in (rates.triton, rates.library))
    return triton, min(triton, library)


def _weight_gradient(
    name: str,
    rates: Rates,
    rows: float,
    out_width: int,
    in_width: int,
    num_layers: int,
    experts: tuple[float, ...],
) -> OpTime:
    """Models the time of a weight gradient for this project's code before optimization, and for the current code.

    `OpTime.before` is the time of this project's earlier kernel, which has one launch per layer. `OpTime.now` is the
    time of the faster of cuBLAS and this project's current kernel. The current kernel has one launch for all
    `num_layers` layers, and may split the rows of an expert between Triton programs. The times of this project's
    kernels follow from the number of waves of Triton programs. The time of cuBLAS follows from the FLOPs.
    """
    from beit3_ds.kernels.triton.weight_gradient_launch import choose_share_rows, splits_rows

    multiprocessors, lengths = NUM_MULTIPROCESSORS[rates.architecture], [round(rows * share) for share in experts]
    tiles = -(-out_width // _TILE) * -(-in_width // _TILE)
    row_seconds = rates.product_seconds(2 * _TILE**2, rates.triton) * multiprocessors

    def whole(tiles: int) -> float:
        """Returns the seconds of a launch in which each Triton program sums over all rows of an expert."""
        waves = -(-tiles // multiprocessors)
        longest, average = max(lengths) * waves, rows / len(lengths) * -(-tiles * len(lengths) // multiprocessors)
        return max(longest, average) * row_seconds

    now = whole(num_layers * tiles)
    if splits_rows(num_layers * tiles, rates.architecture):
        share = choose_share_rows(lengths, num_layers * tiles, multiprocessors)
        programs = num_layers * tiles * sum(-(-length // share) for length in lengths)
        partial_sums = rates.pass_seconds(2 * programs * _TILE**2 * 4)
        now = -(-programs // multiprocessors) * share * row_seconds + partial_sums
    library = rates.product_seconds(2 * rows * out_width * in_width * num_layers, 0.95 * rates.library)
    return OpTime(name, num_layers * whole(tiles), min(now, library))
