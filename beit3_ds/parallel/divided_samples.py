"""Divides the samples of a micro-batch over the tensor-parallel ranks, for heads that are not split themselves.

Tensor-parallel ranks hold equal copies of such a head. If all computed all samples, operations whose gradients are
summed by atomic additions, such as ROIAlign and grid_sample, would make the copies drift apart. So each rank computes
its own samples, and the gradients are summed over the ranks, which gives all ranks bitwise equal sums.
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
    """Describes which samples of a micro-batch each rank of a tensor-parallel group computes; size 1 is valid."""

    tensor: TensorParallel
    """The tensor-parallel group."""
    row_counts: tuple[int, ...]
    """Number of rows of each sample of the micro-batch, in the order of the stream."""

    @property
    def own(self) -> slice:
        """Returns the indices of this rank's samples; the ranks' numbers of samples differ by at most one."""
        count, size, rank = len(self.row_counts), self.tensor.size, self.tensor.rank
        return slice(count * rank // size, count * (rank + 1) // size)

    @property
    def own_rows(self) -> tuple[int, int]:
        """Returns the range [start, stop) of the rows of this rank's samples."""
        stops = [0, *accumulate(self.row_counts)]
        return stops[self.own.start], stops[self.own.stop]

    def take(self, x_TD: Tensor) -> Tensor:
        """Returns the rows of this rank's samples, (N, D), from a tensor that all ranks hold.

        Forward sends nothing; backward all-reduces T * D elements, so that every rank has the gradient of all rows.
        """
        start, stop = self.own_rows
        return self.tensor.copy_to(x_TD)[start:stop]

    def merge(self, y_ND: Tensor) -> Tensor:
        """Returns the rows of all samples, (T, D), on every rank; the inverse of `take`.

        Forward all-reduces T * D elements; backward sends nothing. Every rank must use the result in the same way.
        """
        start, stop = self.own_rows
        total = sum(self.row_counts)
        return self.tensor.reduce_from(F.pad(y_ND, (0, 0) * (y_ND.dim() - 1) + (start, total - stop)))

    def sum_terms(self, sums_K: Tensor) -> Tensor:
        """Returns the sums of the terms over all samples, (K,); forward all-reduces K elements, backward sends nothing.

        Args:
            sums_K: sums of the terms over this rank's samples; a rank without samples has zeros that depend on all
                parameters (`x.sum() * 0`).
        """
        return self.tensor.reduce_from(sums_K)


def sum_gradients(module: nn.Module, tensor: TensorParallel) -> None:
    """Makes backward sum the gradients of a module's parameters over the tensor-parallel ranks; call it in `forward`.

    Each gradient is all-reduced when backward has computed it. All ranks must run the same modules in the same order in
    every micro-batch, on zero rows if need be, so that their messages match; ZeRO-3 needs this too. Further calls have
    no effect. With one rank nothing is sent.

    Args:
        module: module whose parameters all ranks hold, and which runs on each rank's own samples.
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
