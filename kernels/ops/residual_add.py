"""Adds the output of attention or FFN, summed over tensor-parallel ranks, to the residual stream.

This output is called a branch below. On a CPU, PyTorch writes a new tensor in two passes: the first pass adds the bias
to the branch, and the second pass adds the residual stream. On a GPU, a kernel from `triton/residual_add.py` adds bias
and residual stream in one pass. If PyTorch's operations are faster on a GPU, they are used instead (`measured_op`).
"""

# T packed rows, D width, E experts; expert e owns rows [stops[e - 1], stops[e]).

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.expert_rows import fits_kernels, row_lengths, row_tiling
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import Slices
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared


def residual_add_reference(
    residual_TD: Tensor, partial_TD: Tensor, slices: Slices, biases: Sequence[Tensor], factor_T: Tensor | None
) -> Tensor:
    """Computes `residual_add` in plain PyTorch."""
    stream = residual_TD.dtype
    parts = [partial_TD[start:stop].to(stream) + b_D for (start, stop), b_D in zip(slices, biases, strict=True)]
    branch_TD = torch.cat(parts)
    return residual_TD + (branch_TD if factor_T is None else factor_T.unsqueeze(1) * branch_TD)


def residual_add(
    residual_TD: Tensor, partial_TD: Tensor, slices: Slices, biases: Sequence[Tensor], factor_T: Tensor | None
) -> Tensor:
    """Computes y = residual + factor * (partial + bias) in the residual's dtype, with the bias of each row's expert.

    Call this function after the ranks have summed the output of a row-parallel layer, so that bias and factor are
    applied once, and not once per rank. In the backward pass, the residual's gradient is y's gradient, without a copy.
    The bias of an expert without rows gets a zero gradient.

    Args:
        residual_TD: residual stream, (T, D), in float32 or the branch's dtype.
        partial_TD: output of the branch without its bias, (T, D).
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        biases: one vector (D,) per expert.
        factor_T: factor of stochastic depth for each row of the branch; None means 1. It gets no gradient.

    Returns:
        y_TD, a new tensor.
    """
    stops = tuple(stop for _, stop in slices)
    kernels = runs_kernels(residual_TD, partial_TD.dtype)
    y_TD: Tensor = _ResidualAdd.apply(residual_TD, partial_TD, factor_T, stops, kernels, *biases)
    return y_TD


def runs_kernels(residual_TD: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether `residual_add` may use its GPU kernels; otherwise it uses PyTorch's operations.

    The kernels must support the rows (`fits_kernels`), and must pass their check at the first use on the device
    (`self_check`).

    Args:
        residual_TD: residual stream.
        dtype: dtype of the branch.
    """
    if not fits_kernels(residual_TD, dtype):
        return False
    return KERNELS.are_trusted(residual_TD.device, dtype, width=residual_TD.shape[1], stream=residual_TD.dtype)


def check_kernels(device: torch.device, dtype: torch.dtype, width: int, stream: torch.dtype | None = None) -> None:
    """Compares the Triton kernels with the reference, forward and backward, for three experts; one expert has no rows.

    Args:
        device: device of the kernels.
        dtype: dtype of the branch and the biases.
        width: columns per row, D.
        stream: dtype of the residual stream; None means the branch's dtype.

    Raises:
        WrongResultError: if a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 61, width, generator=generator).to(device)
    residual_TD, partial_TD, dy_TD = drawn[0].to(stream or dtype), drawn[1].to(dtype), drawn[2].to(stream or dtype)
    biases = torch.randn(3, width, generator=generator).to(device, dtype).unbind()
    factors = torch.rand(61, generator=generator).to(device, stream or dtype)
    inputs = (residual_TD, partial_TD, *biases, dy_TD)
    names = ("y", "d_residual", "d_partial", *(f"d_bias_{expert}" for expert in range(3)))
    for factor_T in (None, factors):

        def operator(
            residual_TD: Tensor, partial_TD: Tensor, *biases: Tensor, factor_T: Tensor | None = factor_T
        ) -> Tensor:
            y_TD: Tensor = _ResidualAdd.apply(residual_TD, partial_TD, factor_T, (37, 37, 61), True, *biases)
            return y_TD

        def reference(
            residual_TD: Tensor, partial_TD: Tensor, *biases: Tensor, factor_T: Tensor | None = factor_T
        ) -> Tensor:
            factor_T = None if factor_T is None else factor_T.to(residual_TD.dtype)
            return residual_add_reference(residual_TD, partial_TD, ((0, 37), (37, 37), (37, 61)), biases, factor_T)

        check_against_reference(names, with_gradients(operator)(*inputs), with_gradients(reference), inputs)


KERNELS = TrustedKernels("residual_add", check_kernels)
"""Decides whether `residual_add` may use its Triton kernels. A check at the first use on a device must pass."""


class _ResidualAdd(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual_TD: Tensor,
        partial_TD: Tensor,
        factor_T: Tensor | None,
        stops: tuple[int, ...],
        kernels: bool,
        *biases: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(factor_T)
        ctx.stops, ctx.kernels, ctx.dtype = stops, kernels, partial_TD.dtype
        add = _FORWARD if kernels else _forward_plain
        y_TD: Tensor = add(residual_TD.contiguous(), partial_TD.contiguous(), stops, biases, factor_T)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        (factor_T,) = ctx.saved_tensors
        differentiate = _BACKWARD if ctx.kernels else _backward_plain
        d_partial_TD, d_biases_ED = differentiate(dy_TD.contiguous(), ctx.stops, factor_T, ctx.dtype)
        if factor_T is None:
            d_partial_TD = dy_TD.to(ctx.dtype)  # no copy if the branch has the residual stream's dtype
        return (dy_TD, d_partial_TD, None, None, None, *d_biases_ED.unbind())


def _forward_plain(
    residual_TD: Tensor, partial_TD: Tensor, stops: Sequence[int], biases: Sequence[Tensor], factor_T: Tensor | None
) -> Tensor:
    y_TD = torch.empty_like(residual_TD)
    lengths = row_lengths(stops)
    for partial_part, y_part, b_D in zip(partial_TD.split(lengths), y_TD.split(lengths), biases, strict=True):
        torch.add(partial_part.to(y_part.dtype), b_D, out=y_part)
    if factor_T is None:
        return y_TD.add_(residual_TD)
    return torch.addcmul(residual_TD, y_TD, factor_T.unsqueeze(1), out=y_TD)


def _backward_plain(
    dy_TD: Tensor, stops: Sequence[int], factor_T: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of the branch and of each expert's bias in plain PyTorch, in `dtype`.

    If `factor_T` is None, the gradient of the branch equals dy. The first result is then a tensor without rows, and the
    caller uses dy.
    """
    d_partial_TD = dy_TD if factor_T is None else dy_TD * factor_T.unsqueeze(1)
    d_biases_ED = torch.stack([part.sum(0) for part in d_partial_TD.split(row_lengths(stops))]).to(dtype)
    return torch.empty_like(dy_TD[:0], dtype=dtype) if factor_T is None else d_partial_TD.to(dtype), d_biases_ED


@Prepared
def _forward_triton(
    residual_TD: Tensor, partial_TD: Tensor, stops: Sequence[int], biases: Sequence[Tensor], factor_T: Tensor | None
) -> Callable[..., Tensor]:
    from beit3_ds.kernels.triton.residual_add_launch import forward  # Triton is needed on a GPU only

    return forward.prepare(residual_TD, partial_TD, stops, biases, factor_T, row_tiling(residual_TD))


@Prepared
def _backward_triton(
    dy_TD: Tensor, stops: Sequence[int], factor_T: Tensor | None, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.residual_add_launch import backward

    return backward.prepare(dy_TD, stops, factor_T, row_tiling(dy_TD), dtype)


_FORWARD = MeasuredOp("residual_add", {"triton": _forward_triton, "library": _forward_plain}, on_cpu=_forward_plain)
_BACKWARD = MeasuredOp(
    "residual_add_backward", {"triton": _backward_triton, "library": _backward_plain}, on_cpu=_backward_plain
)
