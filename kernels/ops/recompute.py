"""Rows that the backward pass makes again, so that the layers which take them need not keep them."""

# T packed rows, D width.

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class RowRecipe:
    """How to make rows again from tensors that are kept anyway, once for all layers that took them.

    It holds no tensors between two backward passes: what autograd frees, or recomputes, is truly gone.
    """

    def __init__(self, make: Callable[..., Tensor]) -> None:
        """Takes the function that makes the rows (T, D) from the tensors of `RowSource`."""
        self._make = make
        self._takers = self._waiting = 0
        self._rows_TD: Tensor | None = None

    def join(self) -> None:
        """Counts a layer that will take the rows in the backward pass."""
        self._takers += 1

    def make(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the rows (T, D), and lets go of them when the last layer has taken them.

        Args:
            tensors: those of `RowSource`.
        """
        if self._rows_TD is None:
            self._rows_TD, self._waiting = self._make(*tensors), self._takers
        rows_TD, self._waiting = self._rows_TD, self._waiting - 1
        if self._waiting == 0:
            self._rows_TD = None
        return rows_TD


class RowSource(NamedTuple):
    """What a layer keeps instead of its input."""

    recipe: RowRecipe
    tensors: tuple[Tensor, ...]
    """Without gradients; they cost nothing if something else keeps them anyway."""


def kept_rows(x_TD: Tensor, source: RowSource | None) -> tuple[RowRecipe | None, tuple[Tensor, ...]]:
    """What a layer keeps of its input for the backward pass: the input itself, or its source."""
    if source is None:
        return None, (x_TD,)
    source.recipe.join()
    return source


def taken_rows(recipe: RowRecipe | None, tensors: Sequence[Tensor]) -> Tensor:
    """The input, in the backward pass, from what `kept_rows` returned."""
    if recipe is None:
        (x_TD,) = tensors
        return x_TD
    with torch.no_grad():
        return recipe.make(tensors)
