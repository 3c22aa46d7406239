"""Provides the tensor-parallel group, differentiable collectives, and parameters split over the group, as in
Megatron-LM.

Follows Shoeybi et al., 2019, arXiv:1909.08053, section 3. Sequence parallelism follows Korthikanti et al., 2022,
arXiv:2205.05198, section 4.2.

The residual stream is (T, D): packed tokens by hidden size. Without sequence parallelism, every rank holds all T rows
between tensor-parallel layers. With sequence parallelism, the residual stream is padded with zeros to P * n rows, for P
ranks and n = ceil(T / P). Rank r holds rows [r * n, (r + 1) * n).
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

_VOCAB_ALIGNMENT = 64  # rows; keeps the sizes of split matrices at multiples of hardware tiles


@dataclass(frozen=True)
class Split:
    """Describes this rank's part of a split parameter: indices [start, stop) of the whole tensor along `dim`."""

    dim: int
    start: int
    stop: int
    size: int
    """Size of the whole tensor along `dim`."""
    padding: int = 0
    """Number of padding indices at the end of this rank's tensor along `dim`."""

    @property
    def local_size(self) -> int:
        """Returns the size of this rank's tensor along `dim`, including padding."""
        return self.stop - self.start + self.padding

    def take(self, whole: Tensor) -> Tensor:
        """Returns this rank's part of the tensor `whole`, as a view without padding."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def trim(self, local: Tensor) -> Tensor:
        """Returns a view of this rank's tensor without padding."""
        return local.narrow(self.dim, 0, self.stop - self.start)


@dataclass(frozen=True)
class TensorParallel:
    """Describes this rank's tensor-parallel group of P ranks. A group of size 1 sends nothing."""

    group: dist.ProcessGroup | None = None
    """Process group for device tensors; None if P is 1."""
    rank: int = 0
    """Rank within the group."""
    size: int = 1
    """Number of ranks in the group (P)."""
    host: HostGroup = field(default_factory=HostGroup)
    """Group of the P ranks for values in host memory."""
    sequence_parallel: bool = False
    """Whether each rank holds only its own rows between tensor-parallel layers. Has no effect if P is 1."""

    @property
    def divides_rows(self) -> bool:
        """Returns whether each rank holds only its own rows between tensor-parallel layers."""
        return self.sequence_parallel and self.size > 1

    def own_row_range(self, num_rows: int) -> tuple[int, int]:
        """Returns the range [start, stop) of this rank's rows. The range may include padding: rows with index
        `num_rows` or higher.
        """
        if not self.divides_rows:
            return 0, num_rows
        part = -(-num_rows // self.size)
        return self.rank * part, (self.rank + 1) * part

    def own_slices(self, slices: Sequence[tuple[int, int]], num_rows: int) -> Sequence[tuple[int, int]]:
        """Converts row ranges of the residual stream to ranges within this rank's rows.

        With sequence parallelism, the last returned range also contains this rank's padding rows. Without sequence
        parallelism, returns `slices` unchanged.

        Args:
            slices: consecutive row ranges [start, stop) that cover [0, num_rows).
            num_rows: number of rows of the residual stream on all ranks together (T).
        """
        if not self.divides_rows:
            return slices
        first, end = self.own_row_range(num_rows)
        borders = [*(start for start, _ in slices), max(num_rows, end)]
        own = [min(max(border, first), end) - first for border in borders]
        return list(itertools.pairwise(own))

    def own_rows(self, x: Tensor) -> Tensor:
        """Returns this rank's rows of a replicated tensor. Neither the forward nor the backward pass communicates.

        With sequence parallelism, rows are padded with zeros to the same number on every rank. Without sequence
        parallelism, returns all rows.
        """
        if not self.divides_rows:
            return x
        start, stop = self.own_row_range(len(x))
        return _pad_rows(x[start:stop], stop - start)

    def scatter_rows(self, x: Tensor) -> Tensor:
        """Returns this rank's rows of a replicated tensor. Without sequence parallelism, these are all rows: returns
        `x` unchanged.

        With sequence parallelism, the ranks divide the rows, after zeros have been added so that all ranks get the same
        number. The backward pass all-gathers the gradients of all ranks' rows and removes the padding.
        """
        return _ScatterRows.apply(x, self) if self.divides_rows else x

    def gather_rows(self, x: Tensor, num_rows: int) -> Tensor:
        """Returns the rows of all ranks, without padding, for a computation that every rank repeats on all rows.

        With sequence parallelism, the forward pass all-gathers the ranks' rows and their padding; `num_rows` is the
        number of rows without padding. Without sequence parallelism, returns `x` unchanged.
        """
        return _GatherRows.apply(x, self, num_rows) if self.divides_rows else x

    def gather_from(self, x: Tensor, num_rows: int) -> Tensor:
        """Gathers all rows of the residual stream for tensor-parallel layers. The backward pass sums the gradients.

        With sequence parallelism, the forward pass all-gathers the ranks' rows and their padding, and returns the
        `num_rows` rows without padding. The backward pass pads the gradients again and reduce-scatters them. Without
        sequence parallelism, calls `copy_to`.
        """
        return _GatherFrom.apply(x, self, num_rows) if self.divides_rows else self.copy_to(x)

    def reduce_scatter_to(self, x: Tensor) -> Tensor:
        """Sums the partial results of all ranks, and returns this rank's rows of the sum.

        With sequence parallelism, the forward pass reduce-scatters all rows, including padding. The backward pass
        all-gathers the gradients of all rows and removes the padding. Without sequence parallelism, returns all rows
        (`reduce_from`).
        """
        return _ReduceScatterTo.apply(x, self) if self.divides_rows else self.reduce_from(x)

    def share(self, *parameters: Tensor) -> tuple[Tensor, ...]:
        """Returns replicated parameters unchanged, and makes their gradients complete on all ranks.

        With sequence parallelism, a rank's gradients cover only the rank's rows. The backward pass therefore
        all-reduces all gradients in one message. Without sequence parallelism, every rank has complete gradients, and
        nothing is sent. Use this method only for small parameters, because ZeRO-3 keeps them gathered until the
        backward pass.
        """
        return _Share.apply(self, *parameters) if self.divides_rows else parameters

    def split(self, size: int, dim: int = 0) -> Split:
        """Splits a dimension evenly over the ranks, and returns this rank's part.

        Args:
            size: length of the dimension; the number of ranks must divide it.
            dim: index of the dimension.
        """
        assert size % self.size == 0, f"{self.size} tensor-parallel ranks do not divide {size}"
        part = size // self.size
        return Split(dim, self.rank * part, (self.rank + 1) * part, size)

    def split_vocabulary(self, size: int) -> Split:
        """Splits the rows of a vocabulary over the ranks, and returns this rank's part.

        Each of the P ranks holds ceil(size / P) rows, rounded up to a multiple of 64 if P exceeds 1 and `size` is at
        least 64 P. Rows beyond the vocabulary are padding. Because all ranks have the same number of rows, ZeRO
        flattens parameters in the same way on all ranks, and replicated parameters stay bitwise equal.
        """
        assert size >= self.size, f"{self.size} tensor-parallel ranks share a vocabulary of {size}"
        alignment = _VOCAB_ALIGNMENT if self.size > 1 and size >= _VOCAB_ALIGNMENT * self.size else 1
        part = -(-size // (self.size * alignment)) * alignment
        start, stop = (min(rank * part, size) for rank in (self.rank, self.rank + 1))
        return Split(0, start, stop, size, part - (stop - start))

    def copy_to(self, x: Tensor) -> Tensor:
        """Passes a replicated tensor to tensor-parallel layers (operator f of Megatron-LM).

        The forward pass is the identity. The backward pass all-reduces x.numel() elements.
        """
        return x if self.size == 1 else _CopyTo.apply(x, self.group)

    def reduce_from(self, x: Tensor) -> Tensor:
        """Sums the partial results of tensor-parallel layers over the ranks (operator g of Megatron-LM).

        The forward pass all-reduces x.numel() elements. The backward pass is the identity.
        """
        return x if self.size == 1 else _ReduceFrom.apply(x, self.group)

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduces `x` in place, without gradient, and returns it."""
        if self.size > 1 and x.numel():
            dist.all_reduce(x, op=op, group=self.group)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Stacks one tensor per rank, without gradient. The tensors must have equal shapes."""
        parts = [x] if self.size == 1 else [torch.empty_like(x) for _ in range(self.size)]
        if self.size > 1 and x.numel():
            dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)


def split_parameter(split: Split, *shape: int, padding_value: float = 0.0) -> nn.Parameter:
    """Builds this rank's part of a split parameter. Only the padding is initialized.

    The attribute `parallel_split` of the parameter describes the split. The attribute `tensor_model_parallel` makes
    DeepSpeed count the parts of all ranks in the gradient norm.

    Args:
        split: this rank's part.
        shape: shape of the whole tensor.
        padding_value: value of the padding.
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
    """Returns whether tensor-parallel ranks hold different parts of a parameter."""
    return bool(getattr(parameter, "tensor_model_parallel", False))


def logical_shape(parameter: nn.Parameter, local: torch.Size | None = None) -> torch.Size:
    """Returns the logical shape of a parameter, which is its shape without tensor parallelism.

    Args:
        parameter: this rank's parameter.
        local: shape of this rank's part; None uses `parameter.shape`. Under ZeRO-3, pass the shape, because
            `parameter.shape` is another one.
    """
    split: Split | None = getattr(parameter, "parallel_split", None)
    shape = list(parameter.shape if local is None else local)
    if split is not None:
        shape[split.dim] = split.size
    return torch.Size(shape)


def own_part(parameter: nn.Parameter, whole: Tensor) -> Tensor:
    """Returns this rank's part of the tensor `whole`, as a view without padding.

    Args:
        parameter: parameter that defines the split.
        whole: values of the whole tensor.
    """
    split: Split | None = getattr(parameter, "parallel_split", None)
    return whole if split is None else split.take(whole)


def logical_part(parameter: nn.Parameter, local: Tensor | None = None) -> Tensor:
    """Returns a view of this rank's part of a parameter, in the shape of `own_part`. The view does not contain padding.

    Args:
        parameter: parameter that defines the split and the padding.
        local: tensor to view instead of the parameter, such as the gradient or, under ZeRO-3, the gathered values. Has
            the shape of this rank's part with padding. None uses the parameter.
    """
    local = parameter if local is None else local
    split: Split | None = getattr(parameter, "parallel_split", None)
    return local if split is None else split.trim(local)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        # Clone first, because autograd may pass the same gradient to another consumer.
        dx = dx.clone(memory_format=torch.contiguous_format)
        if dx.numel():
            dist.all_reduce(dx, group=ctx.group)
        return dx, None


class _ReduceFrom(torch.autograd.Function):
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


class _GatherFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nD: Tensor, tensor: TensorParallel, num_rows: int) -> Tensor:
        ctx.tensor = tensor
        return _all_gather_rows(x_nD, tensor)[:num_rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TD: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter_rows(dx_TD, ctx.tensor), None, None


class _ReduceScatterTo(torch.autograd.Function):
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
