"""Counts the bytes that autograd saves for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(module: nn.Module, forward: Callable[[], Any], given: Sequence[Tensor] = ()) -> int:
    """Runs `forward`; returns the bytes of all saved storages, without parameters and the tensors in `given`."""
    known = {x.untyped_storage().data_ptr() for x in (*module.parameters(), *given)}
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = forward()
    del result  # only now: storages that are freed earlier could be counted once for two
    return sum(kept.values())
