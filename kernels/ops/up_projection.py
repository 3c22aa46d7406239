"""Computes the FFN's first linear layer. On a GPU, also computes the GELU, unless a sub-LN follows.

On a GPU, the kernel computes the GELU while the product is in registers (`triton/multiway_ffn.py`). If a separate pass
for the GELU is faster, that pass is used instead (`measured_op`). If a sub-LN follows, `out_projection` computes GELU
and sub-LN in one pass. On a CPU, `out_projection` computes the GELU in buffers that fit into the cache.
"""

# T packed rows, D input width, F output width (of this rank).

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops.cuda_kernels import grouped_gemm, is_built, runs_grouped_gemm
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import (
    MULTIWAY_INPUT_GRADIENT,
    MULTIWAY_LINEAR,
    MULTIWAY_WEIGHT_GRADIENT,
    Slices,
    ends_of,
    multiway_linear,
    slices_of,
)
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.recompute import Recomputable, restore_rows, rows_to_save
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared


class Activation(NamedTuple):
    """Holds the output of an up projection before and after the GELU. Gradients flow through `x_TF` only."""

    x_TF: Tensor
    """Output of the FFN's up projection before the GELU, or attention's merged heads."""
    a_TF: Tensor | None = None
    """GELU(x_TF); None if it has not been computed."""


def up_projection(
    h_TD: Tensor,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    has_norm: bool,
    recompute: Recomputable | None = None,
) -> Activation:
    """Computes x = h @ w.T + b with each row's expert. On a GPU, also computes GELU(x), unless a sub-LN follows.

    Args:
        h_TD: packed rows.
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: one matrix (F, D) per expert in h's dtype, for output width F and input width D.
        biases: one vector (F,) per expert.
        has_norm: whether a sub-LN follows.
        recompute: how to recompute h in the backward pass. With None, h is saved.
    """
    if has_norm or not KERNELS.accept(h_TD):
        return Activation(multiway_linear(h_TD, slices, weights, biases, recompute))
    return Activation(*_UpProjection.apply(h_TD.contiguous(), recompute, ends_of(slices), *weights, *biases))


class _UpProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_TD: Tensor,
        recompute: Recomputable | None,
        ends: tuple[int, ...],
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.ends, weights, biases = ends, parameters[: len(ends)], parameters[len(ends) :]
        ctx.recompute, kept = rows_to_save(h_TD, recompute)
        # Saves the parameters, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(*weights, *kept)
        outputs: tuple[Tensor, Tensor] = UP_PROJECTION(h_TD, ends, weights, biases)
        ctx.mark_non_differentiable(outputs[1])
        ctx.set_materialize_grads(False)  # without this, autograd would allocate zeros as the gradient of GELU(x)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TF: Tensor | None, unused: Tensor | None) -> tuple[Tensor | None, ...]:
        assert dx_TF is not None, "gradients flow through x, which every caller uses"
        saved = ctx.saved_tensors  # read once, because activation checkpointing allows a single read
        weights, kept = saved[: len(ctx.ends)], saved[len(ctx.ends) :]
        dx_TF = dx_TF.contiguous()
        dh_TD = MULTIWAY_INPUT_GRADIENT(dx_TF, None, ctx.ends, weights)
        h_TD = restore_rows(ctx.recompute, kept)
        gradients = MULTIWAY_WEIGHT_GRADIENT(dx_TF, None, h_TD, ctx.ends, True)
        return (dh_TD, None, None, *gradients)


def _up_projection(
    h_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Computes x = h @ w.T + b and GELU(x) in two passes; returns x and GELU(x)."""
    x_TF = MULTIWAY_LINEAR(h_TD, ends, weights, biases)
    return x_TF, F.gelu(x_TF)


@Prepared
def _up_projection_triton(
    h_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_ffn_launch import up_projection  # Triton is needed on a GPU only

    return up_projection.prepare(h_TD, slices_of(ends), weights, biases)


def _up_projection_cuda_cpp(
    h_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    x_TF, a_TF = grouped_gemm(h_TD, slices_of(ends), weights, biases, gelu=True)
    return x_TF, a_TF


def _takes_cuda_cpp(h_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], *rest: Any) -> bool:
    return is_built() and runs_grouped_gemm(h_TD, weights)


def _takes_triton(x: Tensor, *rest: Any) -> bool:
    return KERNELS.accept(x)


UP_PROJECTION = MeasuredOp(
    "up_projection",
    {"triton": _up_projection_triton, "cuda": _up_projection_cuda_cpp, "library": _up_projection},
    on_cpu=_up_projection,
    accepts={"triton": _takes_triton, "cuda": _takes_cuda_cpp},
)
"""Operator for linear layer and GELU, with the arguments of `_up_projection`. Uses the fastest implementation on a GPU.
"""


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernel with plain PyTorch for three experts; one expert has no rows.

    Raises:
        WrongResultError: if a result is wrong.
    """
    from beit3_ds.kernels.triton import multiway_ffn_launch as launch

    slices, generator = [(0, 130), (130, 130), (130, 137)], torch.Generator().manual_seed(0)
    h = torch.randn(137, 96, generator=generator).to(device, dtype)
    weights = [(torch.randn(160, 96, generator=generator) / 10).to(device, dtype) for _ in slices]
    biases = [torch.randn(160, generator=generator).to(device, dtype) for _ in slices]

    def plain(h: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        x = torch.cat(
            [F.linear(h[start:stop], parameters[i], parameters[3 + i]) for i, (start, stop) in enumerate(slices)]
        )
        return x, F.gelu(x)

    results = launch.up_projection(h, slices, weights, biases)
    check_against_reference(("x", "gelu"), results, plain, (h, *weights, *biases))


KERNELS = TrustedKernels("up_projection", check_kernels)
"""Decides whether `up_projection` may use its Triton kernel. A check at the first use on a device must pass."""
