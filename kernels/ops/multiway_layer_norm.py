"""Applies LayerNorm with one scale and shift per expert. The backward pass also adds the residual's gradient.

On a CPU, the op runs PyTorch's LayerNorm on the rows of each expert. On a GPU, one launch of a kernel from
`triton/multiway_layer_norm.py` processes all experts. If PyTorch's LayerNorm is faster on a GPU, it is used instead
(`measured_op`).
"""

# T packed rows, D width, E experts; expert e owns rows [stops[e - 1], stops[e]).

from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.cpu.chunks import accumulate, chunk_rows
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.expert_rows import fits_kernels, row_lengths, row_tiling
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import Slices, ends_of
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.recompute import Recomputable, RecomputeFunction
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared


def multiway_layer_norm_reference(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Computes `multiway_layer_norm` in plain PyTorch."""
    parts = [
        F.layer_norm(x_TD[start:stop], w_D.shape, w_D.to(x_TD.dtype), b_D.to(x_TD.dtype), epsilon)
        for (start, stop), w_D, b_D in zip(slices, weights, biases, strict=True)
    ]
    return x_TD.view_as(x_TD), torch.cat(parts).to(weights[0].dtype)


def multiway_layer_norm(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Normalises each row with its expert's scale and shift. Also returns a view of x_TD for the residual connection.

    If the residual connection uses this view, the backward pass of the norm also adds the residual connection's
    gradient, without a separate pass over the rows. The op saves x, the scales and two numbers per row. It copies
    neither x nor the scales. An expert without rows gets zero gradients.

    Args:
        x_TD: packed rows of the residual stream, in the parameters' dtype or float32.
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: one scale (D,) per expert.
        biases: one shift (D,) per expert, in the scales' dtype.
        epsilon: value added to the variance.

    Returns:
        x_TD, and the normalised rows h_TD = (x - mean) / sqrt(variance + epsilon) * w + b in the parameters' dtype.
        Statistics are computed in float32, or in float64 for float64 rows.
    """
    kernels = runs_kernels(x_TD, weights[0].dtype)
    stream_TD, h_TD = _MultiwayLayerNorm.apply(x_TD, ends_of(slices), epsilon, kernels, *weights, *biases)
    return stream_TD, h_TD


def recomputable_rows(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> Recomputable:
    """Returns an object that recomputes h_TD of `multiway_layer_norm` bit for bit from these arguments.

    The object refers to the parameters and copies none of them. Under ZeRO-3, the parameters are gathered again before
    the backward pass needs them.
    """
    compute = partial(_recompute_rows, ends_of(slices), epsilon)
    return Recomputable(RecomputeFunction(compute), (x_TD.detach(), *weights, *biases))


def _recompute_rows(stops: tuple[int, ...], epsilon: float, x_TD: Tensor, *parameters: Tensor) -> Tensor:
    kernels = runs_kernels(x_TD, parameters[0].dtype)
    norm = _FORWARD if kernels else _forward_plain
    return norm(x_TD.contiguous(), stops, parameters[: len(stops)], parameters[len(stops) :], epsilon)[0]


def runs_kernels(x_TD: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether `multiway_layer_norm` may use its GPU kernels; otherwise it uses PyTorch's operations.

    The kernels must support the rows (`fits_kernels`), and must pass their check at the first use on the device
    (`self_check`).

    Args:
        x_TD: packed rows.
        dtype: dtype of the parameters.
    """
    if not fits_kernels(x_TD, dtype):
        return False
    return KERNELS.are_trusted(x_TD.device, dtype, width=x_TD.shape[1], stream=x_TD.dtype)


def check_kernels(device: torch.device, dtype: torch.dtype, width: int, stream: torch.dtype | None = None) -> None:
    """Compares the Triton kernels with the reference, forward and backward, for three experts; one expert has no rows.

    Args:
        device: device of the kernels.
        dtype: dtype of the parameters and the normalised rows.
        width: columns per row, D.
        stream: dtype of the packed rows; None means the parameters' dtype.

    Raises:
        WrongResultError: if a result is wrong.
    """
    slices, epsilon = ((0, 37), (37, 37), (37, 61)), 1e-5
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, 61, width, generator=generator).to(device)
    x_TD, d_stream_TD, dh_TD = drawn[0].to(stream or dtype), drawn[1].to(stream or dtype), drawn[2].to(dtype)
    parameters = torch.randn(6, width, generator=generator).to(device, dtype).unbind()
    names = ("y", "dx", *(f"d_{kind}_{expert}" for kind in ("weight", "bias") for expert in range(3)))

    def operator(x_TD: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack(_MultiwayLayerNorm.apply(x_TD, (37, 37, 61), epsilon, True, *parameters))

    def reference(x_TD: Tensor, *parameters: Tensor) -> Tensor:
        return torch.stack(multiway_layer_norm_reference(x_TD, slices, parameters[:3], parameters[3:], epsilon))

    def norm_alone(function: Callable[..., Tensor], *leaves: Tensor) -> Tensor:
        return function(*leaves)[1]

    inputs = (x_TD, *parameters)
    both = (*inputs, torch.stack((d_stream_TD, dh_TD)))
    check_against_reference(names, with_gradients(operator)(*both), with_gradients(reference), both)
    alone = (*inputs, dh_TD)
    ours, expected = (with_gradients(partial(norm_alone, function)) for function in (operator, reference))
    check_against_reference(names, ours(*alone), expected, alone)


KERNELS = TrustedKernels("multiway_layer_norm", check_kernels)
"""Decides whether `multiway_layer_norm` may use its Triton kernels. A check at the first use on a device must pass."""


class _MultiwayLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, stops: tuple[int, ...], epsilon: float, kernels: bool, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        weights, biases = parameters[: len(stops)], parameters[len(stops) :]
        norm = _FORWARD if kernels else _forward_plain
        h_TD, *statistics = norm(x_TD.contiguous(), stops, weights, biases, epsilon)
        # Saves the parameters, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(x_TD, *weights, *statistics)
        ctx.stops, ctx.kernels = stops, kernels
        ctx.set_materialize_grads(False)  # an absent gradient of the residual stream stays None
        return x_TD, h_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_stream_TD: Tensor | None, dh_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TD, *saved = ctx.saved_tensors
        weights, statistics = saved[: len(ctx.stops)], saved[len(ctx.stops) :]
        if dh_TD is None:
            return (d_stream_TD, None, None, None, *[torch.zeros_like(w_D) for w_D in weights * 2])
        d_stream_TD = None if d_stream_TD is None else d_stream_TD.contiguous()
        tensors = dh_TD.contiguous(), d_stream_TD, x_TD.contiguous()
        if ctx.kernels:
            dx_TD, d_parameters_2ED = _BACKWARD(*tensors, *statistics, ctx.stops, weights)
            d_parameters = d_parameters_2ED.view(-1, x_TD.shape[1]).unbind()
        else:
            dx_TD, *d_parameters = _backward_plain(*tensors, statistics, ctx.stops, weights)
        return (dx_TD, None, None, None, *d_parameters)


def _forward_plain(
    x_TD: Tensor, stops: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> list[Tensor]:
    """Applies PyTorch's LayerNorm to each expert's rows, in chunks that fit into the cache.

    Returns:
        h_TD, the output for all rows. Then two tensors per expert, (rows of the expert, 1): the mean of each row, and 1
        / standard deviation of each row.
    """
    lengths, length = row_lengths(stops), chunk_rows(x_TD)
    h_TD = ALLOCATOR.empty(x_TD, *x_TD.shape, dtype=weights[0].dtype)
    statistics: list[Tensor] = []
    parts = zip(x_TD.split(lengths), h_TD.split(lengths), _native(weights, x_TD), _native(biases, x_TD), strict=True)
    for x_part, h_part, w_D, b_D in parts:
        of_chunks = []
        for x_chunk, h_chunk in zip(x_part.split(length), h_part.split(length), strict=True):
            normalized, *of_chunk = torch.native_layer_norm(x_chunk, w_D.shape, w_D, b_D, epsilon)
            h_chunk.copy_(normalized)
            of_chunks.append(of_chunk)
        statistics += [ALLOCATOR.settle(torch.cat(chunks)) for chunks in zip(*of_chunks, strict=True)]
    return [h_TD, *statistics]


def _backward_plain(
    dh_TD: Tensor,
    d_stream_TD: Tensor | None,
    x_TD: Tensor,
    statistics: Sequence[Tensor],
    stops: Sequence[int],
    weights: Sequence[Tensor],
) -> list[Tensor]:
    """Computes gradients in plain PyTorch, from the statistics that `_forward_plain` returned.

    Returns:
        dx_TD, then the gradients of all scales, then of all shifts.
    """
    lengths, dx_TD, length = row_lengths(stops), ALLOCATOR.empty_like(x_TD), chunk_rows(x_TD)
    d_parameters: list[list[Tensor]] = []
    parts = zip(
        dh_TD.split(lengths),
        [None] * len(stops) if d_stream_TD is None else d_stream_TD.split(lengths),
        x_TD.split(lengths),
        dx_TD.split(lengths),
        statistics[::2],
        statistics[1::2],
        _native(weights, x_TD),
        strict=True,
    )
    for dh_part, d_stream_part, x_part, dx_part, mean_T1, rstd_T1, w_D in parts:
        totals: list[Tensor] = []
        kept = (rows.split(length) for rows in (dh_part, x_part, mean_T1, rstd_T1, dx_part))
        d_streams = repeat(None) if d_stream_part is None else iter(d_stream_part.split(length))
        for dh, x, mean, rstd, dx in zip(*kept, strict=True):
            # Only the presence of a shift matters, not its values, so the scale is passed in its place.
            dx_chunk, *of_parameters = torch.ops.aten.native_layer_norm_backward.default(
                dh.to(x.dtype), x, w_D.shape, mean, rstd, w_D, w_D, [True, True, True]
            )
            d_stream = next(d_streams)
            dx.copy_(dx_chunk) if d_stream is None else torch.add(dx_chunk, d_stream, out=dx)
            totals = accumulate(totals, of_parameters)
        d_parameters.append([total.to(weights[0].dtype) for total in totals])
    return [dx_TD, *(of_expert[kind] for kind in range(2) for of_expert in d_parameters)]


def _forward_library(
    x_TD: Tensor, stops: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> tuple[Tensor, Tensor]:
    """Computes the results of the forward kernel with PyTorch's LayerNorm.

    On a GPU, `_FORWARD` uses this function if the kernel is slower.

    Returns:
        h_TD, and the mean and 1 / standard deviation of each of T rows, (2, T).
    """
    h_TD, *statistics = _forward_plain(x_TD, stops, weights, biases, epsilon)
    return h_TD, torch.stack((torch.cat(statistics[::2]), torch.cat(statistics[1::2]))).squeeze(2)


def _backward_library(
    dh_TD: Tensor,
    d_stream_TD: Tensor | None,
    x_TD: Tensor,
    statistics_2T: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Computes the results of the backward kernel in plain PyTorch.

    On a GPU, `_BACKWARD` uses this function if the kernel is slower.

    Returns:
        dx_TD, and the gradients of scales and shifts, (2, E, D) for E experts and width D.
    """
    parts = statistics_2T.unsqueeze(2).split(row_lengths(stops), dim=1)
    statistics = [statistic for part in parts for statistic in part.unbind()]
    dx_TD, *d_parameters = _backward_plain(dh_TD, d_stream_TD, x_TD, statistics, stops, weights)
    return dx_TD, torch.stack(d_parameters).unflatten(0, (2, -1))


@Prepared
def _forward_triton(
    x_TD: Tensor, stops: Sequence[int], weights: Sequence[Tensor], biases: Sequence[Tensor], epsilon: float
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_layer_norm_launch import forward  # Triton is needed on a GPU only

    return forward.prepare(x_TD, stops, weights, biases, epsilon, row_tiling(x_TD))


@Prepared
def _backward_triton(
    dh_TD: Tensor,
    d_stream_TD: Tensor | None,
    x_TD: Tensor,
    statistics_2T: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_layer_norm_launch import backward

    return backward.prepare(dh_TD, d_stream_TD, x_TD, statistics_2T, stops, weights, row_tiling(x_TD))


# Both implementations save the same statistics, so forward and backward are chosen separately.
_FORWARD = MeasuredOp(
    "multiway_layer_norm", {"triton": _forward_triton, "library": _forward_library}, on_cpu=_forward_library
)
_BACKWARD = MeasuredOp(
    "multiway_layer_norm_backward", {"triton": _backward_triton, "library": _backward_library}, on_cpu=_backward_library
)


def _native(parameters: Sequence[Tensor], x_TD: Tensor) -> Sequence[Tensor]:
    """Returns the parameters in the dtype that PyTorch's LayerNorm needs for the rows `x_TD`.

    Half-precision rows on a CPU need float32 parameters, because PyTorch computes the statistics of such rows in
    float32. All other rows need parameters in the rows' dtype.
    """
    is_half_on_cpu = x_TD.dtype in (torch.float16, torch.bfloat16) and not x_TD.is_cuda
    dtype = torch.float32 if is_half_on_cpu else x_TD.dtype
    return [parameter_D.to(dtype) for parameter_D in parameters]
