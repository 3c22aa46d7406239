"""The tensor-parallel group, its collectives with their gradients, and how parameters are cut (Megatron-LM).

Follows Shoeybi et al., 2019, arXiv:1909.08053, section 3, and for sequence parallelism Korthikanti et al., 2022,
arXiv:2205.05198, section 4.2.

Between the divided layers the stream's rows are held by all ranks alike or, with sequence parallelism, each rank holds
a run of them: T rows are rounded up to P * n by rows of zeros at the end, and rank r holds rows [r * n, (r + 1) * n).
"""

# T rows, P tensor-parallel size, n = ceil(T / P) rows of one rank, D width.

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from beit3_ds.parallel.host_group import HostGroup

_VOCAB_ALIGNMENT = 64  # rows, so that the shards' matrix products keep the hardware's tile sizes


@dataclass(frozen=True)
class Split:
    """The part of a parameter that this rank holds: indices [start, stop) of the logical tensor along `dim`."""

    dim: int
    start: int
    stop: int
    size: int
    """Logical size along `dim`."""
    padding: int = 0
    """Indices that the local tensor has after the logical ones."""

    @property
    def local_size(self) -> int:
        """Size of the local tensor along `dim`, padding included."""
        return self.stop - self.start + self.padding

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of the logical tensor, without padding, a view."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def trim(self, local: Tensor) -> Tensor:
        """The local tensor without padding, a view."""
        return local.narrow(self.dim, 0, self.stop - self.start)


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place among the P ranks that divide every layer. A group of one is valid and silent."""

    group: dist.ProcessGroup | None = None
    """The group; None if the size is 1."""
    rank: int = 0
    """This rank's number in the group."""
    size: int = 1
    """Ranks in the group, P."""
    host: HostGroup = field(default_factory=HostGroup)
    """The same ranks, for host values; `group` takes device tensors only."""
    sequence_parallel: bool = False
    """Whether the ranks divide the stream's rows where they do not divide its width."""

    @property
    def divides_rows(self) -> bool:
        """Whether a rank holds only its own rows between the divided layers."""
        return self.sequence_parallel and self.size > 1

    def own_row_range(self, num_rows: int) -> tuple[int, int]:
        """The rows [start, stop) that this rank holds between the divided layers; `stop` may exceed `num_rows`."""
        if not self.divides_rows:
            return 0, num_rows
        part = -(-num_rows // self.size)
        return self.rank * part, (self.rank + 1) * part

    def own_slices(self, slices: Sequence[tuple[int, int]], num_rows: int) -> list[tuple[int, int]]:
        """The part of each slice among this rank's rows, counted from the first of them; filler joins the last one.

        Args:
            slices: row ranges [start, stop) that cover [0, num_rows) in order.
            num_rows: T.
        """
        first, end = self.own_row_range(num_rows)
        borders = [*(start for start, _ in slices), max(num_rows, end)]
        own = [min(max(border, first), end) - first for border in borders]
        return list(itertools.pairwise(own))

    def own_rows(self, x: Tensor) -> Tensor:
        """This rank's rows of a tensor that all ranks hold, filler included; no gradient over ranks."""
        if not self.divides_rows:
            return x
        start, stop = self.own_row_range(len(x))
        return _pad_rows(x[start:stop], stop - start)

    def scatter_rows(self, x: Tensor) -> Tensor:
        """Keeps this rank's rows of a tensor (T, D) that all ranks hold alike.

        Forward sends nothing; backward all-gathers P * n * D elements.
        """
        return _ScatterRows.apply(x, self) if self.divides_rows else x

    def gather_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """All ranks' rows, (T, D), for a computation that all ranks do alike.

        Forward all-gathers P * n * D elements; backward sends nothing.
        """
        return _GatherRows.apply(x, self, num_rows) if self.divides_rows else x

    def gather_from(self, x: Tensor, num_rows: int) -> Tensor:
        """Hands the stream to layers of which each rank holds a part: `copy_to` of all its rows, (T, D).

        With sequence parallelism forward all-gathers and backward reduce-scatters P * n * D elements.
        """
        return _GatherIn.apply(x, self, num_rows) if self.divides_rows else self.copy_to(x)

    def reduce_scatter_to(self, x: Tensor) -> Tensor:
        """Sums the ranks' partial results, (T, D): `reduce_from`, of which each rank keeps its rows.

        With sequence parallelism forward reduce-scatters and backward all-gathers P * n * D elements.
        """
        return _ScatterOut.apply(x, self) if self.divides_rows else self.reduce_from(x)

    def share(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Parameters that every rank holds and applies to its own rows, so that their gradients add up over ranks.

        With sequence parallelism backward all-reduces their elements in one message. Under ZeRO-3 they stay gathered
        until then, which is little: they are norms and biases.
        """
        return _Share.apply(self, *parameters) if self.divides_rows else parameters

    def split(self, size: int, dim: int = 0) -> Split:
        """This rank's part of a dimension that P divides."""
        assert size % self.size == 0, f"{self.size} tensor-parallel ranks do not divide {size}"
        part = size // self.size
        return Split(dim, self.rank * part, (self.rank + 1) * part, size)

    def split_vocabulary(self, size: int) -> Split:
        """This rank's rows of a vocabulary: ceil(size / P), rounded up to a multiple of 64 if size is at least 64 P.

        What the last ranks hold beyond the vocabulary is padding; it may be all that a rank holds. Since every rank
        holds as many rows, ZeRO cuts their flat buffers at the same places, and what they hold alike stays alike to
        the bit. A vocabulary that is not divided is not padded.
        """
        assert size >= self.size, f"{self.size} tensor-parallel ranks share a vocabulary of {size}"
        alignment = _VOCAB_ALIGNMENT if self.size > 1 and size >= _VOCAB_ALIGNMENT * self.size else 1
        part = -(-size // (self.size * alignment)) * alignment
        start, stop = (min(rank * part, size) for rank in (self.rank, self.rank + 1))
        return Split(0, start, stop, size, part - (stop - start))

    def copy_to(self, x: Tensor) -> Tensor:
        """Hands a tensor that all ranks hold alike to layers of which each holds a part (operator f).

        Forward sends nothing; backward all-reduces x.numel() elements.
        """
        return x if self.size == 1 else _CopyIn.apply(x, self.group)

    def reduce_from(self, x: Tensor) -> Tensor:
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


def split_parameter(split: Split, *shape: int, padding_value: float = 0.0) -> nn.Parameter:
    """A parameter that holds this rank's part of a logical tensor, uninitialised but for its padding.

    It carries `parallel_split`, which tells its place in the logical tensor, and the mark `tensor_model_parallel`,
    which DeepSpeed reads: without it the gradient norm silently counts one rank's part only.

    Args:
        split: this rank's part.
        shape: the logical shape.
        padding_value: what the padding is filled with.
    """
    local = list(shape)
    assert local[split.dim] == split.size, f"{split} does not cut a tensor of shape {shape}"
    local[split.dim] = split.local_size
    parameter = nn.Parameter(torch.empty(local))
    with torch.no_grad():
        parameter.narrow(split.dim, split.stop - split.start, split.padding).fill_(padding_value)
    parameter.parallel_split = split  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = split.stop - split.start < split.size  # type: ignore[attr-defined]
    return parameter


def is_split(parameter: nn.Parameter) -> bool:
    """Whether the tensor-parallel ranks hold different parts of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def logical_shape(parameter: nn.Parameter, local: torch.Size | None = None) -> torch.Size:
    """The shape of a parameter that no layout of ranks changes.

    Args:
        parameter: this rank's.
        local: its shape on this rank; None is that of the parameter itself.
    """
    split: Split | None = getattr(parameter, "parallel_split", None)
    shape = list(parameter.shape if local is None else local)
    if split is not None:
        shape[split.dim] = split.size
    return torch.Size(shape)


def own_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """This rank's part of the logical tensor of a parameter, without padding, a view."""
    split: Split | None = getattr(parameter, "parallel_split", None)
    return whole if split is None else split.take(whole)


def logical_part(parameter: nn.Parameter, local: Tensor | None = None) -> Tensor:
    """A parameter without its padding, a view; `own_part` of the logical tensor has the same shape.

    Args:
        parameter: tells the padding.
        local: a tensor of its local shape to be viewed instead, such as its gradient or, under ZeRO-3, its values.
    """
    local = parameter if local is None else local
    split: Split | None = getattr(parameter, "parallel_split", None)
    return local if split is None else split.trim(local)


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


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor, ctx.num_rows = tensor, len(x_TD)
        return tensor.own_rows(x_TD).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_nD: Tensor) -> tuple[Tensor, None]:
        return _all_gather_rows(dx_nD, ctx.tensor)[: ctx.num_rows], None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, tensor: TensorParallel, num_rows: int) -> Tensor:
        ctx.tensor = tensor
        return _all_gather_rows(x_nD, tensor)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.tensor.own_rows(dx_TD), None, None


class _GatherIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, tensor: TensorParallel, num_rows: int) -> Tensor:
        ctx.tensor = tensor
        return _all_gather_rows(x_nD, tensor)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(dx_TD, ctx.tensor), None, None


class _ScatterOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, tensor: TensorParallel) -> Tensor:
        ctx.tensor, ctx.num_rows = tensor, len(x_TD)
        return _reduce_scatter_rows(x_TD, tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_nD: Tensor) -> tuple[Tensor, None]:
        return _all_gather_rows(dx_nD, ctx.tensor)[: ctx.num_rows], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: TensorParallel, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.tensor = tensor
        return tuple(parameter.view_as(parameter) for parameter in parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        flat = ctx.tensor.all_reduce(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True))


def _all_gather_rows(x_nD: Tensor, tensor: TensorParallel) -> Tensor:
    whole = x_nD.new_empty(tensor.size * len(x_nD), *x_nD.shape[1:])
    if whole.numel():
        dist.all_gather_into_tensor(whole, x_nD.contiguous(), group=tensor.group)
    return whole


def _reduce_scatter_rows(x_TD: Tensor, tensor: TensorParallel) -> Tensor:
    part = -(-len(x_TD) // tensor.size)
    own = x_TD.new_empty(part, *x_TD.shape[1:])
    if own.numel():
        padded = _pad_rows(x_TD, part * tensor.size).contiguous()
        dist.reduce_scatter_tensor(own, padded, group=tensor.group)
    return own


def _pad_rows(x: Tensor, num_rows: int) -> Tensor:
    missing = num_rows - len(x)
    return x if missing == 0 else F.pad(x, (0, 0) * (x.dim() - 1) + (0, missing))
