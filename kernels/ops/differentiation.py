"""Marks backward passes that cannot be differentiated again."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

_Gradients = TypeVar("_Gradients")


def once_differentiable(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """Decorates a backward pass that autograd must not differentiate, because its own derivative is unknown.

    With PyTorch's decorator of this name, an error is raised only when the computed gradients are differentiated. With
    this decorator, an error is raised right away if the caller passes `create_graph=True`. This decorator is also
    faster: PyTorch's decorator switches gradient recording off at every call, and this takes longer than launching a
    kernel.
    """

    @wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> _Gradients:
        if torch.is_grad_enabled():  # autograd does this for create_graph=True
            raise RuntimeError(f"{backward.__qualname__} cannot be differentiated: do not pass create_graph=True")
        return backward(ctx, *gradients)

    return checked
