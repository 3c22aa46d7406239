"""Builds the benchmark's cases. A case is one op at one shape, with its baselines."""

# T packed rows, D hidden, F ffn hidden, H heads, K head width, Q sequences, M masked rows, V vocabulary.

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.benchmarks.kernels.case import Case, Cost, Implementation, Problem, as_leaves, random_tensor
from beit3_ds.benchmarks.kernels.expert_cases import ffn_case, norm_case
from beit3_ds.benchmarks.mix import Mix, draw_mix
from beit3_ds.config.model import MODEL_SIZES
from beit3_ds.kernels.ops.linear_cross_entropy import linear_cross_entropy
from beit3_ds.kernels.ops.packed_attention import packed_attention


def build_cases(size: str, samples: int, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[], Case]]:
    """Yields one function per case. A call of the function builds the case, so that only one case at a time needs
    memory.

    Args:
        size: model size, a key of MODEL_SIZES.
        samples: number of images. There are as many pairs, and as many texts.
        device: device of all tensors.
        dtype: dtype of all tensors.
    """
    shape, mix = MODEL_SIZES[size], draw_mix(size, samples)
    for build in (_attention_case, ffn_case, norm_case, _mlm_case):
        yield partial(build, size, shape, mix, device, dtype)


def _attention_case(size: str, shape: dict[str, int], mix: Mix, device: torch.device, dtype: torch.dtype) -> Case:
    heads, width = shape["num_attention_heads"], shape["hidden_size"] // shape["num_attention_heads"]
    num_rows = mix.num_rows
    q, k, v, dy = (random_tensor(num_rows, heads, width, device=device, dtype=dtype, seed=i) for i in range(4))
    squares = sum(length * length for length in mix.lengths)
    element, products = dtype.itemsize, 4.0 * squares * heads * width
    rows_bytes = num_rows * heads * width * element
    order = torch.cat([torch.arange(start, stop) for ranges in mix.ranges for start, stop in ranges]).to(device)

    def ours() -> Problem:
        leaves = as_leaves(q, k, v)
        own_q, own_k, own_v = leaves
        return Problem(leaves, lambda: packed_attention(own_q, own_k, own_v, mix.ranges), dy, lambda y: y)

    def padded() -> Problem:
        lengths = torch.tensor(mix.lengths, device=device)
        real = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
        leaves = as_leaves(*(_pad(x[order], real).transpose(1, 2) for x in (q, k, v)))
        mask = real[:, None, None, :]

        def packed(y: Tensor) -> Tensor:
            rows = y.transpose(1, 2)[real]
            return torch.empty_like(rows).index_copy(0, order, rows)

        gradient = _pad(dy[order], real).transpose(1, 2).contiguous()
        q_padded, k_padded, v_padded = leaves

        def run() -> Tensor:
            return F.scaled_dot_product_attention(q_padded, k_padded, v_padded, attn_mask=mask)

        return Problem(leaves, run, gradient, packed)

    def in_order(attend: Callable[..., Tensor]) -> Problem:
        leaves = as_leaves(*(x[order] for x in (q, k, v)))
        unordered = lambda y: torch.empty_like(y).index_copy(0, order, y)  # noqa: E731
        return Problem(leaves, lambda: attend(*leaves), dy[order], unordered)

    entries = [Implementation("beit3_ds", ours), Implementation("padded SDPA", padded)]
    entries += [
        Implementation(name, partial(in_order, attend) if attend else None, why)
        for name, attend, why in (
            ("torch varlen", *_varlen(mix, device, dtype)),
            ("FlexAttention", *_flex(mix, device)),
            ("flash-attn", *_flash(mix, device, dtype)),
        )
    ]
    forward, backward = Cost(products, 4 * rows_bytes), Cost(2.5 * products, 8 * rows_bytes)
    return Case("packed_attention", f"{size} {mix.describe()} H={heads} K={width}", forward, backward, True, entries)


def _mlm_case(size: str, shape: dict[str, int], mix: Mix, device: torch.device, dtype: torch.dtype) -> Case:
    rows, width, vocabulary = mix.num_masked_tokens, shape["hidden_size"], 64010
    h = random_tensor(rows, width, device=device, dtype=dtype)
    w = random_tensor(vocabulary, width, device=device, dtype=dtype, seed=1, scale=width**-0.5)
    b = random_tensor(vocabulary, device=device, dtype=dtype, seed=2)
    target = torch.randint(0, vocabulary, (rows,), generator=torch.Generator().manual_seed(3)).to(device)
    dy = torch.full((rows,), 1 / rows, device=device)

    def build(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Problem:
        leaves = as_leaves(h, w, b)
        return Problem(leaves, lambda: loss(*leaves), dy, lambda y: y)

    def plain(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(h, w, b).float(), target, reduction="none")

    def fused(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.linear_cross_entropy(h, w, target, linear_bias=b, reduction="none").float()

    has_fused = hasattr(F, "linear_cross_entropy")  # torch 2.14 has it, torch 2.11 does not
    why_absent = "" if has_fused else f"torch {torch.__version__} does not have it"
    entries = [
        Implementation("beit3_ds", partial(build, lambda h, w, b: linear_cross_entropy(h, w, b, target, 128))),
        Implementation("torch cross_entropy", partial(build, plain)),
        Implementation("torch linear_cross_entropy", partial(build, fused) if has_fused else None, why_absent),
        _liger_cross_entropy(build, target, device),
    ]
    products, element = 2.0 * rows * width * vocabulary, dtype.itemsize
    weight_bytes, row_bytes = vocabulary * width * element, rows * width * element
    forward = Cost(products, weight_bytes + row_bytes)
    backward = Cost(2 * products, 2 * weight_bytes + 3 * row_bytes)
    return Case("linear_cross_entropy", f"{size} M={rows} V={vocabulary}", forward, backward, True, entries)


def _liger_cross_entropy(build: Callable[..., Problem], target: Tensor, device: torch.device) -> Implementation:
    name = "Liger"
    if device.type != "cuda":
        return Implementation(name, None, "it needs a GPU")
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return Implementation(name, None, "liger-kernel is not installed")
    loss: Any = LigerFusedLinearCrossEntropyFunction

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        # Liger computes gradients in the forward pass with one upstream gradient for all rows, so it returns the mean.
        mean: Tensor = loss.apply(h, w, target, b)[0]
        return mean.expand(len(h))

    return Implementation(name, partial(build, run))


def _varlen(mix: Mix, device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor] | None, str]:
    if device.type != "cuda" or dtype == torch.float32:
        return None, "it has kernels for half precision on a GPU only"
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = _cu_seqlens(mix, device), max(mix.lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        assert isinstance(y, Tensor)
        return y

    return attend, ""


def _flex(mix: Mix, device: torch.device) -> tuple[Callable[..., Tensor] | None, str]:
    if device.type != "cuda":
        return None, "it has no backward pass on a CPU"
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled: Any = torch.compile(flex_attention)
    sequence = torch.repeat_interleave(torch.tensor(mix.lengths)).to(device)
    same = lambda b, h, i, j: sequence[i] == sequence[j]  # noqa: E731
    mask = create_block_mask(same, None, None, mix.num_rows, mix.num_rows, device=device)

    def attend(*qkv: Tensor) -> Tensor:
        y: Tensor = compiled(*(x.transpose(0, 1)[None] for x in qkv), block_mask=mask)
        return y[0].transpose(0, 1)

    return attend, ""


def _flash(mix: Mix, device: torch.device, dtype: torch.dtype) -> tuple[Callable[..., Tensor] | None, str]:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None, "flash-attn is not installed"
    if device.type != "cuda" or dtype == torch.float32:
        return None, "it has kernels for half precision on a GPU only"
    bounds, longest = _cu_seqlens(mix, device), max(mix.lengths)
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest), ""


def _cu_seqlens(mix: Mix, device: torch.device) -> Tensor:
    return torch.tensor([0, *mix.lengths]).cumsum(0).to(device, torch.int32)


def _pad(rows: Tensor, real: Tensor) -> Tensor:
    padded = rows.new_zeros(*real.shape, *rows.shape[1:])
    padded[real] = rows
    return padded


__all__: Sequence[str] = ["build_cases"]
