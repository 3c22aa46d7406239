"""Marks backward passes that cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Gradients = TypeVar("_Gradients")


def once_differentiable(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Decorates a backward pass whose own derivative is unknown, so that autograd cannot differentiate it.

    PyTorch's decorator of this name returns gradients that fail when they are differentiated. This decorator refuses
    `create_graph=True` right away. So it need not switch gradients off at every call, which takes longer than launching
    a kernel.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> _Gradients:
        if torch.is_grad_enabled():  # autograd does this for create_graph=True
            raise RuntimeError(f"{backward.__qualname__} cannot be differentiated: do not pass create_graph=True")
        return backward(ctx, *gradients)

    return checked
