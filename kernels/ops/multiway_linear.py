"""Applies the linear layers of several experts, each to its own rows of one packed tensor.

On a CPU, each expert's product is written into the expert's rows of one output tensor. On a GPU, either one kernel
launch computes all experts, or cuBLAS computes one product per expert. The faster of these is used (`measured_op`).
"""

# T packed rows, D input width, F output width; an expert owns rows [start, stop).

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.cpu.matmul import matmul
from beit3_ds.kernels.ops.cuda_kernels import grouped_gemm, is_built, runs_grouped_gemm
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.recompute import Recomputable, restore_rows, rows_to_save
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared

Slices = Sequence[tuple[int, int]]
"""Row range [start, stop) of each expert in a tensor of packed rows. The ranges cover all rows in order."""


def multiway_linear_reference(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    """Computes `multiway_linear` in plain PyTorch."""
    parts = [F.linear(x_TD[start:stop], w, b) for (start, stop), w, b in zip(slices, weights, biases, strict=True)]
    return torch.cat(parts)


def multiway_linear(
    x_TD: Tensor,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    recompute: Recomputable | None = None,
) -> Tensor:
    """Applies each expert's linear layer to its own rows, and writes all results into one output tensor.

    Computes y[start:stop] = x[start:stop] @ w_FD.T + b_F for each expert. The gradients of an expert without rows are
    zeros, so every parameter gets a gradient in every call.

    Args:
        x_TD: packed rows.
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: one matrix (F, D) per expert in x's dtype, for output width F and input width D. The matrices are saved
            for the backward pass without copies.
        biases: one vector (F,) per expert.
        recompute: how to recompute x in the backward pass. With None, x is saved.

    Returns:
        y_TF in x's dtype.
    """
    return _MultiwayLinear.apply(x_TD, recompute, ends_of(slices), *weights, *biases)


class _MultiwayLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, recompute: Recomputable | None, ends: tuple[int, ...], *parameters: Tensor
    ) -> Tensor:
        ctx.ends, weights, biases = ends, parameters[: len(ends)], parameters[len(ends) :]
        x_TD = x_TD.contiguous()
        ctx.recompute, kept = rows_to_save(x_TD, recompute)
        # Saves the parameters, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(*weights, *kept)
        y_TF: Tensor = MULTIWAY_LINEAR(x_TD, ends, weights, biases)
        return y_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TF: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once, because activation checkpointing allows a single read
        weights, kept = saved[: len(ctx.ends)], saved[len(ctx.ends) :]
        dy_TF = dy_TF.contiguous()
        dx_TD = MULTIWAY_INPUT_GRADIENT(dy_TF, None, ctx.ends, weights)
        x_TD = restore_rows(ctx.recompute, kept)
        return (dx_TD, None, None, *MULTIWAY_WEIGHT_GRADIENT(dy_TF, None, x_TD, ctx.ends, True))


def ends_of(slices: Slices) -> tuple[int, ...]:
    """Returns the stop row of each expert's row range: (197, 591) for ((0, 197), (197, 591)).

    Operators take only the stop rows, because each range starts where the range before it ends.
    """
    return tuple([stop for _, stop in slices])


@lru_cache(maxsize=256)
def slices_of(ends: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """Returns the row ranges with these stop rows: ((0, 197), (197, 591)) for (197, 591). Inverse of `ends_of`."""
    return tuple(pairwise([0, *ends]))


def scale_rows(x_TD: Tensor, factor_T: Tensor | None) -> Tensor:
    """Multiplies each row by its factor. Returns `x_TD` itself if `factor_T` is None."""
    return x_TD if factor_T is None else torch.mul(x_TD, factor_T.unsqueeze(1), out=ALLOCATOR.empty_like(x_TD))


def _linear(x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    y_TF = ALLOCATOR.empty(x_TD, len(x_TD), len(weights[0]))
    for i, (start, stop) in enumerate(slices_of(ends)):
        matmul(x_TD[start:stop], weights[i], biases[i] if biases else None, y_TF[start:stop])
    return y_TF


def _input_gradient(dy_TF: Tensor, factor_T: Tensor | None, ends: tuple[int, ...], weights: Sequence[Tensor]) -> Tensor:
    dy_TF = scale_rows(dy_TF, factor_T)
    dx_TD = ALLOCATOR.empty(dy_TF, len(dy_TF), weights[0].shape[1])
    for (start, stop), w_FD in zip(slices_of(ends), weights, strict=True):
        matmul(dy_TF[start:stop], w_FD.t(), None, dx_TD[start:stop])
    return dx_TD


def _weight_gradient(
    dy_TF: Tensor, factor_T: Tensor | None, x_TD: Tensor, ends: tuple[int, ...], with_bias: bool
) -> list[Tensor]:
    dy_TF = scale_rows(dy_TF, factor_T)
    parts = [(dy_TF[start:stop], x_TD[start:stop]) for start, stop in slices_of(ends)]
    width, inner = dy_TF.shape[1], x_TD.shape[1]
    d_weights = [torch.mm(dy.t(), x, out=ALLOCATOR.empty(dy, width, inner, lasting=True)) for dy, x in parts]
    d_biases = [torch.sum(dy, 0, out=ALLOCATOR.empty(dy, width, lasting=True)) for dy, _ in parts] if with_bias else []
    return [*d_weights, *d_biases]


@Prepared
def _linear_triton(
    x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Callable[..., Tensor]:
    from beit3_ds.kernels.triton.multiway_ffn_launch import linear  # Triton is needed on a GPU only

    return linear.prepare(x_TD, slices_of(ends), weights, biases)


@Prepared
def _input_gradient_triton(
    dy_TF: Tensor, factor_T: Tensor | None, ends: tuple[int, ...], weights: Sequence[Tensor]
) -> Callable[..., Tensor]:
    from beit3_ds.kernels.triton.multiway_ffn_launch import input_gradient

    return input_gradient.prepare(dy_TF, factor_T, slices_of(ends), weights)


@Prepared
def _weight_gradient_triton(
    dy_TF: Tensor, factor_T: Tensor | None, x_TD: Tensor, ends: tuple[int, ...], with_bias: bool
) -> Callable[..., list[Tensor]]:
    from beit3_ds.kernels.triton.weight_gradient_launch import weight_gradient

    of_layers = weight_gradient.prepare([dy_TF], factor_T, x_TD, slices_of(ends), with_bias)

    def run(dy_TF: Tensor, factor_T: Tensor | None, x_TD: Tensor, *rest: Any) -> list[Tensor]:
        d_weights, d_biases = of_layers([dy_TF], factor_T, x_TD, *rest)
        return [*d_weights, *d_biases]

    return run


def _takes_triton(x: Tensor, *rest: Any) -> bool:
    return KERNELS.accept(x)


def _linear_cuda_cpp(
    x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Tensor:
    return grouped_gemm(x_TD, slices_of(ends), weights, biases, gelu=False)[0]


def _takes_cuda_cpp(x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]) -> bool:
    return len(biases) > 0 and is_built() and runs_grouped_gemm(x_TD, weights)


# The implementations by a library are the same as on a CPU: one cuBLAS product per expert.
MULTIWAY_LINEAR = MeasuredOp(
    "multiway_linear",
    {"triton": _linear_triton, "cuda": _linear_cuda_cpp, "library": _linear},
    on_cpu=_linear,
    accepts={"triton": _takes_triton, "cuda": _takes_cuda_cpp},
)
MULTIWAY_INPUT_GRADIENT = MeasuredOp(
    "multiway_input_gradient",
    {"triton": _input_gradient_triton, "library": _input_gradient},
    on_cpu=_input_gradient,
    accepts={"triton": _takes_triton},
)
MULTIWAY_WEIGHT_GRADIENT = MeasuredOp(
    "multiway_weight_gradient",
    {"triton": _weight_gradient_triton, "library": _weight_gradient},
    on_cpu=_weight_gradient,
    accepts={"triton": _takes_triton},
)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernels with plain PyTorch for three experts; one expert has no rows.

    Raises:
        WrongResultError: if a result is wrong.
    """
    from beit3_ds.kernels.triton import multiway_ffn_launch as launch
    from beit3_ds.kernels.triton.weight_gradient_launch import weight_gradient

    slices, ends = [(0, 130), (130, 130), (130, 137)], (130, 130, 137)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(137, width, generator=generator).to(device, dtype) for width in (96, 64))
    factor = torch.randint(0, 2, (137,), generator=generator).to(device, dtype)
    weights = [(torch.randn(64, 96, generator=generator) / 10).to(device, dtype) for _ in slices]
    biases = [torch.randn(64, generator=generator).to(device, dtype) for _ in slices]
    y = launch.linear(x, slices, weights, biases)
    check_against_reference(("y",), (y,), lambda x, *p: (_linear(x, ends, p[:3], p[3:]),), (x, *weights, *biases))
    dx = launch.input_gradient(dy, factor, slices, weights)
    check_against_reference(
        ("dx",), (dx,), lambda dy, f, *w: (_input_gradient(dy, f, ends, w),), (dy, factor, *weights)
    )
    d_weights, d_biases = weight_gradient([dy], factor, x, slices, True)
    names = [*(f"dw {i}" for i in range(3)), *(f"db {i}" for i in range(3))]
    gradients = lambda dy, f, x: tuple(_weight_gradient(dy, f, x, ends, True))  # noqa: E731
    check_against_reference(names, (*d_weights, *d_biases), gradients, (dy, factor, x))


KERNELS = TrustedKernels("multiway_linear", check_kernels)
"""Decides whether multiway linear layers may use their Triton kernels. A check at the first use on a device must pass.
"""
