"""Divides the samples of a micro-batch over tensor-parallel ranks, for heads whose parameters are not split.

Each tensor-parallel rank has a copy of such a head. If every rank computed all samples, the copies would diverge:
operations such as RoIAlign and grid_sample sum gradients by atomic additions in random order. Instead, each rank
computes its own samples, and gradients are summed over the ranks. The sums are bitwise equal on all ranks.
"""

# T rows of all samples, N rows of this rank's samples, D width, K terms.

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_ds.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class DividedSamples:
    """Assigns the samples of a micro-batch to the ranks of a tensor-parallel group, which may have size 1."""

    tensor: TensorParallel
    """The tensor-parallel group."""
    row_counts: tuple[int, ...]
    """Number of rows of each sample in the micro-batch, in the order of the residual stream."""

    @property
    def own(self) -> slice:
        """Returns the indices of this rank's samples. The sample counts of any two ranks differ by at most one."""
        count, size, rank = len(self.row_counts), self.tensor.size, self.tensor.rank
        return slice(count * rank // size, count * (rank + 1) // size)

    @property
    def own_rows(self) -> tuple[int, int]:
        """Returns the row range [start, stop) of this rank's samples."""
        stops = [0, *accumulate(self.row_counts)]
        return stops[self.own.start], stops[self.own.stop]

    def take(self, x_TD: Tensor) -> Tensor:
        """Returns the rows of this rank's samples, (N, D), from a tensor that all ranks hold.

        The forward pass does not communicate. The backward pass all-reduces T * D elements, so every rank gets the
        gradient of all rows.
        """
        start, stop = self.own_rows
        return self.tensor.copy_to(x_TD)[start:stop]

    def merge(self, y_ND: Tensor) -> Tensor:
        """Returns the rows of all samples, (T, D), on every rank; inverse of `take`.

        The forward pass all-reduces T * D elements, and the backward pass does not communicate. All ranks must do the
        same computation with the result.
        """
        start, stop = self.own_rows
        total = sum(self.row_counts)
        return self.tensor.reduce_from(F.pad(y_ND, (0, 0) * (y_ND.dim() - 1) + (start, total - stop)))

    def sum_terms(self, sums_K: Tensor) -> Tensor:
        """Sums loss terms over the samples of all ranks, (K,).

        The forward pass all-reduces K elements, and the backward pass does not communicate.

        Args:
            sums_K: sum of each term over this rank's samples. A rank without samples passes zeros that depend on all
                parameters (`x.sum() * 0`).
        """
        return self.tensor.reduce_from(sums_K)


def sum_gradients(module: nn.Module, tensor: TensorParallel) -> None:
    """Makes the backward pass sum the gradients of a module over tensor-parallel ranks. Call this function in the
    forward pass.

    Each gradient is all-reduced as soon as it is computed. All ranks must run the same modules in the same order in
    every micro-batch, so that their collectives match. A rank without samples runs the modules on zero rows. Repeated
    calls for the same module have no effect. With one rank, nothing is sent.

    Args:
        module: module that has equal parameters on all ranks and runs on each rank's own samples.
        tensor: the tensor-parallel group.
    """
    if tensor.size == 1:
        return
    for parameter in module.parameters():
        if parameter.requires_grad and not getattr(parameter, "is_gradient_summed", False):
            parameter.register_hook(_summation(tensor))
            parameter.is_gradient_summed = True  # type: ignore[attr-defined]


def _summation(tensor: TensorParallel) -> Callable[[Tensor], Tensor]:
    def add_up(gradient: Tensor) -> Tensor:
        # A copy, because autograd may pass the same gradient to another consumer.
        return tensor.all_reduce(gradient.clone(memory_format=torch.contiguous_format))

    return add_up
