"""Marks backward passes that cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Gradients = TypeVar("_Gradients")


def once_differentiable(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Decorates a backward pass that autograd must not differentiate, because its own derivative is unknown.

    PyTorch's decorator of this name switches gradients off at every call, and returns gradients that fail when they are
    differentiated. This decorator instead raises an error right away if the caller passes `create_graph=True`. This
    check is faster; switching gradients off takes longer than launching a kernel.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> _Gradients:
        if torch.is_grad_enabled():  # autograd does this for create_graph=True
            raise RuntimeError(f"{backward.__qualname__} cannot be differentiated: do not pass create_graph=True")
        return backward(ctx, *gradients)

    return checked
