"""Recomputes the input of linear layers in the backward pass, so that the layers need not save it."""

# T packed rows, D width.

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor


class RecomputeFunction:
    """Recomputes rows from saved tensors, once per backward pass for all layers that use the rows.

    After a backward pass, the object refers to no tensors, so autograd can free their memory.
    """

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        """Stores `compute`, a function that computes the rows (T, D) from `Recomputable.tensors`."""
        self._compute = compute
        self._num_users = self._num_waiting = 0
        self._rows_TD: Tensor | None = None

    def add_user(self) -> None:
        """Counts one more layer that will call this object in the backward pass."""
        self._num_users += 1

    def __call__(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the rows (T, D). Each layer that uses the rows calls this method once per backward pass. The first
        call computes the rows, and they are released after the last call.

        Args:
            tensors: arguments of the function, which autograd saved (`Recomputable.tensors`).
        """
        if self._rows_TD is None:
            self._rows_TD, self._num_waiting = self._compute(*tensors), self._num_users
        rows_TD, self._num_waiting = self._rows_TD, self._num_waiting - 1
        if self._num_waiting == 0:
            self._rows_TD = None
        return rows_TD


class Recomputable(NamedTuple):
    """Describes how a layer's input can be recomputed in the backward pass instead of being saved."""

    function: RecomputeFunction
    """Function that computes the layer's input from `tensors`."""
    tensors: tuple[Tensor, ...]
    """Arguments of `function`, detached from the graph. They take no extra memory if another layer saves them too."""


def rows_to_save(x_TD: Tensor, recompute: Recomputable | None) -> tuple[RecomputeFunction | None, tuple[Tensor, ...]]:
    """Returns what a layer must save to have its input rows in the backward pass.

    If `recompute` is None, returns None and `(x_TD,)`. Otherwise, returns `recompute.function` and `recompute.tensors`,
    and counts the layer as a user of the function.
    """
    if recompute is None:
        return None, (x_TD,)
    recompute.function.add_user()
    return recompute


def restore_rows(function: RecomputeFunction | None, tensors: Sequence[Tensor]) -> Tensor:
    """Returns the rows (T, D) that a layer had as input, for use in the layer's backward pass.

    The rows were saved, or are recomputed now. Autograd does not record the recomputation.

    Args:
        function: function from `rows_to_save`, or None if the rows were saved.
        tensors: tensors from `rows_to_save`, which autograd saved.
    """
    if function is None:
        (x_TD,) = tensors
        return x_TD
    return function(tensors)
