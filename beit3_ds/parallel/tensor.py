"""The tensor-parallel group, its collectives with their gradients, and how parameters are cut (Megatron-LM).

Follows Shoeybi et al., 2019, arXiv:1909.08053, section 3.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_VOCAB_ALIGNMENT = 64  # rows, so that the shards' matrix products keep the hardware's tile sizes


@dataclass(frozen=True)
class Split:
    """The part of a parameter that this rank holds: indices [start, stop) of the logical tensor along `dim`."""

    dim: int
    start: int
    stop: int
    size: int
    """Logical size along `dim`."""

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of the logical tensor, a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the P ranks that divide every layer. A group of one is valid and silent."""

    group: dist.ProcessGroup | None = None
    """The group; None if the size is 1."""
    rank: int = 0
    """This rank's number in the group."""
    size: int = 1
    """Ranks in the group, P."""

    def split(self, size: int, dim: int = 0) -> Split:
        """This rank's part of a dimension that P divides."""
        assert size % self.size == 0, f"{self.size} tensor-parallel ranks do not divide {size}"
        part = size // self.size
        return Split(dim, self.rank * part, (self.rank + 1) * part, size)

    def split_vocabulary(self, size: int) -> Split:
        """This rank's rows of a vocabulary: nearly equal, cut at multiples of 64 where each rank gets that many.

        Nothing is padded: a vocabulary keeps its logical size under every layout.
        """
        assert size >= self.size, f"{self.size} tensor-parallel ranks share a vocabulary of {size}"
        alignment = _VOCAB_ALIGNMENT if size >= _VOCAB_ALIGNMENT * self.size else 1
        borders = [rank * size // self.size // alignment * alignment for rank in range(self.size)] + [size]
        return Split(0, borders[self.rank], borders[self.rank + 1], size)

    def copy_in(self, x: Tensor) -> Tensor:
        """Hands a tensor that all ranks hold alike to layers of which each holds a part (operator f).

        Forward sends nothing; backward all-reduces x.numel() elements.
        """
        return x if self.size == 1 else _CopyIn.apply(x, self.group)

    def sum_out(self, x: Tensor) -> Tensor:
        """Sums the ranks' partial results (operator g).

        Forward all-reduces x.numel() elements; backward sends nothing.
        """
        return x if self.size == 1 else _SumOut.apply(x, self.group)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """Reduces in place, without a gradient, and returns `x`; sends x.numel() elements."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Stacks the ranks' tensors of one shape, without a gradient, (P, ...); sends x.numel() elements."""
        parts = [x] if self.size == 1 else [torch.empty_like(x) for _ in range(self.size)]
        if self.size > 1 and x.numel():
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def broadcast_object(self, value: Any) -> Any:
        """Returns the first rank's `value` on all ranks; sends it pickled."""
        if self.size == 1:
            return value
        assert self.group is not None
        values = [value]
        dist.broadcast_object_list(values, src=dist.get_global_rank(self.group, 0), group=self.group)
        return values[0]


def split_parameter(split: Split, *shape: int) -> nn.Parameter:
    """An uninitialised parameter that holds this rank's part of a logical tensor.

    It carries `parallel_split`, which tells its place in the logical tensor, and the mark `tensor_model_parallel`,
    which DeepSpeed reads: without it the gradient norm silently counts one rank's part only.

    Args:
        split: this rank's part.
        shape: the logical shape.
    """
    local = list(shape)
    assert local[split.dim] == split.size, f"{split} does not cut a tensor of shape {shape}"
    local[split.dim] = split.stop - split.start
    parameter = nn.Parameter(torch.empty(local))
    parameter.parallel_split = split  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = split.stop - split.start < split.size  # type: ignore[attr-defined]
    return parameter


def is_split(parameter: nn.Parameter) -> bool:
    """Whether the tensor-parallel ranks hold different parts of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def logical_shape(parameter: nn.Parameter) -> torch.Size:
    """The shape of a parameter that no layout of ranks changes."""
    split: Split | None = getattr(parameter, "parallel_split", None)
    shape = list(parameter.shape)
    if split is not None:
        shape[split.dim] = split.size
    return torch.Size(shape)


def own_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's part of the logical tensor of a parameter, a view."""
    split: Split | None = getattr(parameter, "parallel_split", None)
    return whole if split is None else split.take(whole)


class _CopyIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        # A copy: autograd may hand the same gradient to another consumer.
        dx = dx.clone(memory_format=torch.contiguous_format)
        if dx.numel():
            dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _SumOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        if x.numel():
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return dx, None
