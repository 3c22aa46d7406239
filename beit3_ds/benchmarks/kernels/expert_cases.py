"""Builds the benchmark's cases for ops with one set of parameters per expert: the FFN and the LayerNorm."""

# T packed rows, D hidden, F ffn hidden; two experts, of images and of texts.

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.benchmarks.kernels.case import Case, Cost, Implementation, Problem, as_leaves, random_tensor
from beit3_ds.benchmarks.mix import Mix
from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import up_projection

_EXPERTS, _EPSILON = 2, 1e-5


class _FFN(NamedTuple):
    """Holds the parameters of the FFN; each field has one tensor per expert."""

    w1: tuple[Tensor, ...]
    b1: tuple[Tensor, ...]
    scale: tuple[Tensor, ...]
    shift: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]
    b2: tuple[Tensor, ...]


def ffn_case(size: str, shape: dict[str, int], mix: Mix, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case of the FFN: products, GELU, sub-LN, stochastic depth and residual, but not the input norm."""
    rows, width, inner = mix.num_rows, shape["hidden_size"], shape["ffn_hidden_size"]
    slices, draw = _slices(mix), partial(random_tensor, device=device, dtype=dtype)
    stream = tuple(draw(rows, width, seed=i) for i in range(3))
    factor = (torch.arange(rows) % 10 > 0).to(device, dtype)
    shapes = ((inner, width), (inner,), (inner,), (inner,), (width, inner), (width,))
    scales = (width**-0.5, 1.0, 1.0, 1.0, inner**-0.5, 1.0)
    parameters = [
        draw(*s, seed=i, scale=scale) for s, scale in zip(shapes, scales, strict=True) for i in range(_EXPERTS)
    ]

    def ours(h: Tensor, residual: Tensor, p: _FFN) -> Tensor:
        activation = up_projection(h, slices, p.w1, p.b1, has_norm=True)
        norm = SubNorm(p.scale, p.shift, _EPSILON, inner)
        joined = {"residual_TD": residual, "factor_T": factor}
        return out_projection(activation, slices, p.w2, p.b2, gelu=True, norm=norm, **joined)

    def sliced(h: Tensor, residual: Tensor, p: _FFN) -> Tensor:
        parts = []
        for i, (start, stop) in enumerate(slices):
            a = F.gelu(F.linear(h[start:stop], p.w1[i], p.b1[i]))
            a = F.layer_norm(a, (inner,), p.scale[i], p.shift[i], _EPSILON)
            parts.append(F.linear(a, p.w2[i], p.b2[i]))
        return residual + factor.unsqueeze(1) * torch.cat(parts)

    def grouped(h: Tensor, residual: Tensor, p: _FFN) -> Tensor:
        offsets = torch.tensor([stop for _, stop in slices], dtype=torch.int32, device=device)
        expert = torch.repeat_interleave(torch.tensor([stop - start for start, stop in slices], device=device))
        each = lambda vectors: torch.stack(vectors)[expert]  # noqa: E731
        u = F.grouped_mm(h, torch.stack(p.w1).mT, offs=offsets) + each(p.b1)
        a = F.layer_norm(F.gelu(u), (inner,), eps=_EPSILON) * each(p.scale) + each(p.shift)
        return residual + factor.unsqueeze(1) * (F.grouped_mm(a, torch.stack(p.w2).mT, offs=offsets) + each(p.b2))

    def build(function: Callable[..., Tensor]) -> Problem:
        leaves = as_leaves(*stream[:2], *parameters)
        groups = _FFN(*(leaves[2 + _EXPERTS * i : 2 + _EXPERTS * (i + 1)] for i in range(6)))
        return Problem(leaves, lambda: function(*leaves[:2], groups), stream[2], lambda y: y)

    entries = [
        Implementation("beit3_ds", partial(build, ours)),
        Implementation("slice by slice", partial(build, sliced)),
        Implementation("grouped_mm", partial(build, grouped)),
        _compiled("torch.compile of slices", build, sliced, device),
    ]
    products, element = 4.0 * rows * width * inner, dtype.itemsize
    weights, row_bytes = _EXPERTS * 2 * width * inner * element, rows * width * element
    forward = Cost(products, weights + 3 * row_bytes)
    backward = Cost(2 * products, 2 * weights + 3 * row_bytes)
    return Case("multiway FFN", f"{size} {mix.describe()} D={width} F={inner}", forward, backward, True, entries)


def norm_case(size: str, shape: dict[str, int], mix: Mix, device: torch.device, dtype: torch.dtype) -> Case:
    """Builds the case of the LayerNorm on the residual stream."""
    rows, width, slices = mix.num_rows, shape["hidden_size"], _slices(mix)
    draw = partial(random_tensor, device=device, dtype=dtype)
    x, dy = draw(rows, width), draw(rows, width, seed=1)
    parameters = [draw(width, seed=i) for i in range(2 * _EXPERTS)]

    def build(normalize: Callable[..., Tensor]) -> Problem:
        leaves = as_leaves(x, *parameters)
        return Problem(
            leaves, lambda: normalize(leaves[0], leaves[1 : 1 + _EXPERTS], leaves[1 + _EXPERTS :]), dy, _same
        )

    def sliced(layer_norm: Callable[..., Any]) -> Callable[..., Tensor]:
        def normalize(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> Tensor:
            parts = [layer_norm(x[i:j], w, b) for (i, j), w, b in zip(slices, weights, biases, strict=True)]
            return torch.cat(parts)

        return normalize

    plain = sliced(lambda x, w, b: F.layer_norm(x, w.shape, w, b, _EPSILON))
    entries = [
        Implementation("beit3_ds", partial(build, lambda x, w, b: multiway_layer_norm(x, slices, w, b, _EPSILON)[1])),
        Implementation("torch layer_norm", partial(build, plain)),
        _compiled("torch.compile of slices", build, plain, device),
        _foreign("apex", "apex.normalization.fused_layer_norm", _apex_norm, build, sliced, device),
        _foreign("Liger", "liger_kernel.ops.layer_norm", _liger_norm, build, sliced, device),
    ]
    row_bytes = rows * width * dtype.itemsize
    costs = Cost(0.0, 2 * row_bytes), Cost(0.0, 3 * row_bytes)
    return Case("multiway layer norm", f"{size} {mix.describe()} D={width}", *costs, False, entries)


def _slices(mix: Mix) -> list[tuple[int, int]]:
    """Returns two row ranges: image rows, then text rows."""
    _, texts, _, end = mix.boundaries
    return [(0, texts), (texts, end)]


def _same(y: Tensor) -> Tensor:
    return y


def _compiled(
    name: str, build: Callable[..., Problem], function: Callable[..., Tensor], device: torch.device
) -> Implementation:
    if device.type != "cuda":
        return Implementation(name, None, "on a CPU it takes minutes to compile")
    compiled: Any = torch.compile(function)
    return Implementation(name, partial(build, compiled))


def _foreign(
    name: str,
    module: str,
    adapt: Callable[[Any], Callable[..., Any]],
    build: Callable[..., Problem],
    sliced: Callable[..., Callable[..., Tensor]],
    device: torch.device,
) -> Implementation:
    """Returns another library's LayerNorm as a baseline. If this machine cannot run it, the `Implementation` contains
    the reason.
    """
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return Implementation(name, None, f"not installed: {error}")
    if device.type != "cuda":
        return Implementation(name, None, "it needs a GPU")
    return Implementation(name, partial(build, sliced(adapt(found))))


def _apex_norm(module: Any) -> Callable[..., Any]:
    return lambda x, w, b: module.fused_layer_norm_affine(x, w, b, w.shape, _EPSILON)


def _liger_norm(module: Any) -> Callable[..., Any]:
    return lambda x, w, b: module.LigerLayerNormFunction.apply(x, w, b, _EPSILON)
