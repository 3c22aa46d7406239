"""Recomputes rows in the backward pass, so that the layers which use them need not save them."""

# T packed rows, D width.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RecomputeFunction:
    """Recomputes rows from saved tensors, once for all layers that share the rows.

    Between two backward passes it holds no tensors, so memory that autograd frees is free.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        """Wraps the function that computes the rows (T, D) from `Recomputable.tensors`."""
        self._compute = compute
        self._num_users = self._num_waiting = 0
        self._rows_TD: Tensor | None = None

    def add_user(self) -> None:
        """Counts one more layer that needs the rows in the backward pass."""
        self._num_users += 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the rows (T, D) and releases them when the last layer has asked for them.

        Args:
            tensors: saved values of `Recomputable.tensors`.
        """
        if self._rows_TD is None:
            self._rows_TD, self._num_waiting = self._compute(*tensors), self._num_users
        rows_TD, self._num_waiting = self._rows_TD, self._num_waiting - 1
        if self._num_waiting == 0:
            self._rows_TD = None
        return rows_TD


class Recomputable(NamedTuple):
    """Describes how a layer recomputes its input in the backward pass instead of saving it."""

    function: RecomputeFunction
    """Computes the rows from the tensors."""
    tensors: tuple[Tensor, ...]
    """Inputs of the function, without gradients; they cost no memory if something else saves them anyway."""


def rows_to_save(x_TD: Tensor, recompute: Recomputable | None) -> tuple[RecomputeFunction | None, tuple[Tensor, ...]]:
    """Returns the objects that a layer saves for its backward pass: its input, or the means to recompute it."""
    if recompute is None:
        return None, (x_TD,)
    recompute.function.add_user()
    return recompute


def restore_rows(function: RecomputeFunction | None, tensors: Sequence[Tensor]) -> Tensor:
    """Returns a layer's input in the backward pass from the result of `rows_to_save`."""
    if function is None:
        (x_TD,) = tensors
        return x_TD
    with torch.no_grad():
        return function(tensors)
