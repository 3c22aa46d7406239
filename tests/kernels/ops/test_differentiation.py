"""Tests that a backward pass without a derivative of its own is never differentiated."""

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops.differentiation import once_differentiable


class Square(torch.autograd.Function):
    """Computes squares; the backward pass may run once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient: Tensor = 2 * x * dy
        return gradient


def test_a_second_derivative_is_refused() -> None:
    x = torch.tensor([3.0], requires_grad=True)
    assert torch.autograd.grad(Square.apply(x), x)[0].item() == 6.0
    with pytest.raises(RuntimeError, match=r"Square\.backward cannot be differentiated: do not pass create_graph=True"):
        torch.autograd.grad(Square.apply(x), x, create_graph=True)
