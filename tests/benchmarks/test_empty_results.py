"""Tests that operations without results return tensors like those of PyTorch's own, and that these come back."""

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.benchmarks.empty_results import empty_results


def products(dtype: torch.dtype) -> list[Tensor]:
    a, b, c = (torch.ones(*shape, dtype=dtype) for shape in ((5, 7), (7, 3), (5, 3)))
    out, batch_out = torch.zeros(5, 3, dtype=dtype), torch.zeros(1, 5, 3, dtype=dtype)
    results = [a @ b, F.linear(a, b.T, c[0]), torch.bmm(a[None], b[None]), torch.baddbmm(c[None], a[None], b[None])]
    results += [torch.mm(a, b, out=out), torch.addmm(c, a, b, out=out), torch.bmm(a[None], b[None], out=batch_out)]
    return [*results, c.clone().addmm_(a, b), c[None].clone().baddbmm_(a[None], b[None])]


def attention(dtype: torch.dtype) -> list[Tensor]:
    results = []
    for heads_first in (True, False):
        for mask in (None, torch.ones(2, 1, 1, 6, dtype=torch.bool)):
            x = (
                torch.ones(2, 4, 6, 8, dtype=dtype)
                if heads_first
                else torch.ones(2, 6, 4, 8, dtype=dtype).transpose(1, 2)
            )
            x.requires_grad_()
            y = F.scaled_dot_product_attention(x, x, x, attn_mask=mask)
            results += [y, *torch.autograd.grad(y.sum(), x)]
    return results


def gelu(dtype: torch.dtype) -> list[Tensor]:
    x = torch.ones(5, 3, dtype=dtype, requires_grad=True)
    y = F.gelu(x)
    return [y.detach(), *torch.autograd.grad(y.sum(), x)]


@pytest.mark.parametrize("compute", [products, attention, gelu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_results_have_shapes_and_strides(compute: Callable[[torch.dtype], list[Tensor]], dtype: torch.dtype) -> None:
    """Catches a layout that PyTorch would not return, with which a dry run might launch other kernels than a GPU."""
    before = compute(dtype)
    with empty_results():
        empty = compute(dtype)
    after = compute(dtype)
    assert [(x.shape, x.stride(), x.dtype) for x in empty] == [(x.shape, x.stride(), x.dtype) for x in before]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_nothing_is_computed() -> None:
    """Catches an operation that still computes: this product and these updates would take minutes in float16."""
    a = torch.empty(6000, 6000, dtype=torch.float16)
    weight = torch.zeros(3, requires_grad=True)
    weight.grad = torch.ones(3)
    start = time.process_time()
    with empty_results():
        y = torch.mm(a, a, out=torch.zeros(6000, 6000, dtype=torch.float16)) + 0
        torch.optim.AdamW([weight], lr=1.0, fused=True).step()
        assert not torch.zeros(8).normal_().any()
    assert time.process_time() - start < 5 and not y.any() and not weight.any()
