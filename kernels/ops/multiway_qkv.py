"""Computes queries, keys and values of several experts; each expert has its own rows of one packed tensor.

The layers for queries, keys and values have separate parameters. On a GPU, one launch of a kernel from
`triton/multiway_qkv.py` computes all layers and experts. The backward pass launches one kernel for the input gradient,
which is a sum over the three layers, and one kernel for all weight and bias gradients. For small layers, the rows are
divided into shares, and a further kernel adds up the shares' weight and bias gradients. If one cuBLAS product per layer
and expert is faster, cuBLAS is used instead (`measured_op`). This choice is separate for the forward pass, the input
gradient and the weight gradients.
"""

# T packed rows, D input width, F output width of each layer; an expert owns rows [start, stop).

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import (
    MULTIWAY_INPUT_GRADIENT,
    MULTIWAY_LINEAR,
    MULTIWAY_WEIGHT_GRADIENT,
    Slices,
    ends_of,
    multiway_linear_reference,
    slices_of,
)
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.recompute import Recomputable, restore_rows, rows_to_save
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared

NUM_LAYERS = 3
"""Number of linear layers: queries, keys and values, in this order."""


def multiway_qkv_reference(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Computes `multiway_qkv` in plain PyTorch."""
    layers = zip(_by_layer(weights), _by_layer(biases), strict=True)
    return tuple(multiway_linear_reference(x_TD, slices, *parameters) for parameters in layers)


def multiway_qkv(
    x_TD: Tensor,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    recompute: Recomputable | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies each expert's layers for queries, keys and values to the expert's own rows.

    Computes y[start:stop] = x[start:stop] @ w.T + b for each layer and expert. An expert without rows gets zero
    gradients, so every parameter takes part in every call.

    Args:
        x_TD: packed rows.
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: matrices (F, D) in x's dtype: those of all experts for queries, then for keys, then for values. The
            matrices are saved for the backward pass without copies.
        biases: vectors (F,), in the order of `weights`.
        recompute: how to recompute x in the backward pass. With None, x is saved.

    Returns:
        q_TF, k_TF and v_TF in x's dtype.
    """
    return _MultiwayQKV.apply(x_TD, recompute, ends_of(slices), *weights, *biases)


class _MultiwayQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, recompute: Recomputable | None, ends: tuple[int, ...], *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.ends, num_weights = ends, NUM_LAYERS * len(ends)
        weights, biases = parameters[:num_weights], parameters[num_weights:]
        x_TD = x_TD.contiguous()
        ctx.recompute, kept = rows_to_save(x_TD, recompute)
        # Saves the parameters, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(*weights, *kept)
        q_TF, k_TF, v_TF = MULTIWAY_QKV(x_TD, ends, weights, biases)
        return q_TF, k_TF, v_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, num_weights = ctx.saved_tensors, NUM_LAYERS * len(ctx.ends)
        weights, kept = saved[:num_weights], saved[num_weights:]
        dq_TF, dk_TF, dv_TF = (gradient.contiguous() for gradient in gradients)
        dx_TD = QKV_INPUT_GRADIENT(dq_TF, dk_TF, dv_TF, ctx.ends, weights)
        x_TD = restore_rows(ctx.recompute, kept)
        of_parameters = QKV_WEIGHT_GRADIENT(dq_TF, dk_TF, dv_TF, x_TD, ctx.ends)
        return (dx_TD, None, None, *of_parameters)


def _qkv(
    x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    layers = zip(_by_layer(weights), _by_layer(biases), strict=True)
    q_TF, k_TF, v_TF = (MULTIWAY_LINEAR(x_TD, ends, *parameters) for parameters in layers)
    return q_TF, k_TF, v_TF


def _input_gradient(
    dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor]
) -> Tensor:
    """Returns the gradient of x, the sum of the three layers' input gradients.

    The terms are added in autograd's order: (values + keys) + queries.
    """
    (q, k, v), differentiate = _by_layer(weights), MULTIWAY_INPUT_GRADIENT
    dx_TD: Tensor = differentiate(dv_TF, None, ends, v)
    for dy_TF, layer in ((dk_TF, k), (dq_TF, q)):
        dx_TD.add_(differentiate(dy_TF, None, ends, layer))
    return dx_TD


def _weight_gradient(dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, x_TD: Tensor, ends: tuple[int, ...]) -> list[Tensor]:
    """Returns the gradients of all weights, then of all biases."""
    differentiate = MULTIWAY_WEIGHT_GRADIENT
    layers = [differentiate(dy_TF, None, x_TD, ends, True) for dy_TF in (dq_TF, dk_TF, dv_TF)]
    of_weights, of_biases = ([x for layer in layers for x in layer[part]] for part in _halves(len(ends)))
    return [*of_weights, *of_biases]


def _input_gradient_in_place(
    dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor]
) -> Tensor:
    """Computes `_input_gradient` with cuBLAS, which adds each product to the sum of the earlier products."""
    layers, dx_TD = _by_layer(weights), dq_TF.new_empty(len(dq_TF), weights[0].shape[1])
    for expert, (start, stop) in enumerate(slices_of(ends)):
        rows_RD = dx_TD[start:stop]
        torch.mm(dv_TF[start:stop], layers[2][expert], out=rows_RD)
        rows_RD.addmm_(dk_TF[start:stop], layers[1][expert])
        rows_RD.addmm_(dq_TF[start:stop], layers[0][expert])
    return dx_TD


@Prepared
def _qkv_triton(
    x_TD: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_qkv_launch import qkv  # Triton is needed on a GPU only

    return qkv.prepare(x_TD, slices_of(ends), weights, biases)


@Prepared
def _input_gradient_triton(
    dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, ends: tuple[int, ...], weights: Sequence[Tensor]
) -> Callable[..., Tensor]:
    from beit3_ds.kernels.triton.multiway_qkv_launch import qkv_input_gradient

    return qkv_input_gradient.prepare(dq_TF, dk_TF, dv_TF, slices_of(ends), weights)


@Prepared
def _weight_gradient_triton(
    dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, x_TD: Tensor, ends: tuple[int, ...]
) -> Callable[..., list[Tensor]]:
    from beit3_ds.kernels.triton.weight_gradient_launch import weight_gradient

    of_layers = weight_gradient.prepare((dq_TF, dk_TF, dv_TF), None, x_TD, slices_of(ends), True)

    def run(dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, x_TD: Tensor, ends: Any) -> list[Tensor]:
        of_weights, of_biases = of_layers((dq_TF, dk_TF, dv_TF), None, x_TD, ends, True)
        return [*of_weights, *of_biases]

    return run


def _takes_triton(x: Tensor, *rest: Any) -> bool:
    return KERNELS.accept(x)


# The implementations by a library run one cuBLAS product per layer and expert.
MULTIWAY_QKV = MeasuredOp(
    "multiway_qkv", {"triton": _qkv_triton, "library": _qkv}, on_cpu=_qkv, accepts={"triton": _takes_triton}
)
"""Operator for queries, keys and values, with the arguments of `_qkv`. Uses the fastest implementation on a GPU."""
QKV_INPUT_GRADIENT = MeasuredOp(
    "multiway_qkv_input_gradient",
    {"triton": _input_gradient_triton, "library": _input_gradient_in_place},
    on_cpu=_input_gradient,
    accepts={"triton": _takes_triton},
)
"""Operator for the gradient of the three layers' input, with the arguments of `_input_gradient`. Uses the fastest
implementation on a GPU."""
QKV_WEIGHT_GRADIENT = MeasuredOp(
    "multiway_qkv_weight_gradient",
    {"triton": _weight_gradient_triton, "library": _weight_gradient},
    on_cpu=_weight_gradient,
    accepts={"triton": _takes_triton},
)
"""Operator for the gradients of weights and biases, with the arguments of `_weight_gradient`. Uses the fastest
implementation on a GPU."""


def _by_layer(parameters: Sequence[Tensor]) -> list[Sequence[Tensor]]:
    """Splits a list of parameters into those for queries, for keys and for values."""
    num_experts = len(parameters) // NUM_LAYERS
    return [parameters[layer * num_experts : (layer + 1) * num_experts] for layer in range(NUM_LAYERS)]


def _halves(size: int) -> tuple[slice, slice]:
    return slice(None, size), slice(size, None)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernels with plain PyTorch for three experts; one expert has no rows.

    Raises:
        WrongResultError: if a result is wrong.
    """
    from beit3_ds.kernels.triton import multiway_qkv_launch as launch
    from beit3_ds.kernels.triton.weight_gradient_launch import weight_gradient

    slices, ends = [(0, 130), (130, 130), (130, 137)], (130, 130, 137)
    generator = torch.Generator().manual_seed(0)
    x, *dys = (torch.randn(137, width, generator=generator).to(device, dtype) for width in (96, 64, 64, 64))
    weights = [(torch.randn(64, 96, generator=generator) / 10).to(device, dtype) for _ in range(9)]
    biases = [torch.randn(64, generator=generator).to(device, dtype) for _ in range(9)]
    forward = lambda x, *p: multiway_qkv_reference(x, slices, p[:9], p[9:])  # noqa: E731
    check_against_reference(("q", "k", "v"), launch.qkv(x, slices, weights, biases), forward, (x, *weights, *biases))
    dx = launch.qkv_input_gradient(*dys, slices, weights)
    input_gradient = lambda q, k, v, *w: (_input_gradient(q, k, v, ends, w),)  # noqa: E731
    check_against_reference(("dx",), (dx,), input_gradient, (*dys, *weights))
    of_weights, of_biases = weight_gradient(dys, None, x, slices, True)
    names = [f"{kind} {layer} {expert}" for kind in ("dw", "db") for layer in "qkv" for expert in range(3)]
    gradients = lambda q, k, v, x: tuple(_weight_gradient(q, k, v, x, ends))  # noqa: E731
    check_against_reference(names, (*of_weights, *of_biases), gradients, (*dys, x))


KERNELS = TrustedKernels("multiway_qkv", check_kernels)
"""Decides whether `multiway_qkv` may use its Triton kernels. A check at the first use on a device must pass."""
