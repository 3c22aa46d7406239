"""Replaces expensive operations of PyTorch with operations that compute nothing, while a CPU emulates a GPU.

Dry runs and measurements of the host's time need only the shapes and dtypes of results. A dry run also runs the
baselines in PyTorch. On a CPU, their matrix products would take minutes, above all in float16.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def _addmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Tensor:
    return _mm(a, b)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:2], b.shape[2])


def _baddbmm(bias: Tensor, a: Tensor, b: Tensor, **factors: Any) -> Tensor:
    return _bmm(a, b)


def _attention(q: Tensor, k: Tensor, v: Tensor, *options: Any, **named: Any) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    return torch.empty_like(q), q.new_empty(batch, rows, heads, dtype=torch.float32).transpose(1, 2)


def _rows_first(x: Tensor) -> Tensor:
    batch, heads, rows, width = x.shape
    return x.new_empty(batch, rows, heads, width).transpose(1, 2)


def _attention_gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, ...]:
    return tuple(_rows_first(x) for x in (q, k, v))


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.empty_like(x)


def _gelu_gradient(dy: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    return torch.empty_like(dy)


def _first(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
    return x


def _out(*arguments: Any, out: Tensor, **named: Any) -> Tensor:
    return out


def _nothing(*arguments: Any, **named: Any) -> None:
    pass


_REPLACED: dict[str, Callable[..., Any]] = {
    "mm": _mm,
    "addmm": _addmm,
    "bmm": _bmm,
    "baddbmm": _baddbmm,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_gradients,
    "gelu": _gelu,
    "gelu_backward": _gelu_gradient,
    **dict.fromkeys(("mm.out", "addmm.out", "bmm.out", "baddbmm.out"), _out),
    **dict.fromkeys(("addmm_", "baddbmm_", "normal_"), _first),
    "_fused_adamw_": _nothing,
}


@contextmanager
def empty_results() -> Iterator[None]:
    """In the `with` block, makes expensive operations on CPU tensors return undefined values, without computing
    anything.

    These operations are matrix products, attention, GELU, random values and optimizer updates. Results have the right
    shapes, dtypes and strides. The block affects all threads of the process.
    """
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        for name, replacement in _REPLACED.items():
            library.impl(name, replacement, allow_override=True)
        yield
    finally:
        library._destroy()
