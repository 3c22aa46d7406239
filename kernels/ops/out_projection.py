"""Computes the end of an attention or FFN branch in one op: GELU, sub-LN, linear layer, bias, drop path, residual.

The FFN uses the op with GELU, and attention uses the op without GELU. The op saves its input. If it runs on a GPU, or
if ranks divide the columns of a row, it also saves the sub-LN's statistics. The backward pass recomputes other
activations. On a CPU, GELU and norm process chunks of rows that fit into the cache. On a GPU, one pass computes GELU
and norm (`activation_norm`), and `triton/multiway_ffn.py` adds bias and residual while the product is in registers.
"""

# T packed rows, R rows of a row block, F input width (of this rank), D output width.

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.cpu.chunks import accumulate, chunk_rows
from beit3_ds.kernels.cpu.matmul import matmul
from beit3_ds.kernels.ops.activation_norm import ACTIVATION_NORM, ACTIVATION_NORM_BACKWARD
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import (
    MULTIWAY_INPUT_GRADIENT,
    MULTIWAY_LINEAR,
    MULTIWAY_WEIGHT_GRADIENT,
    Slices,
    ends_of,
    scale_rows,
    slices_of,
)
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.ops.sub_norm import ROW_STATISTICS, SUB_NORM, SUB_NORM_GRADIENT, SUB_NORM_SUMS, SubNorm
from beit3_ds.kernels.ops.up_projection import Activation
from beit3_ds.kernels.prepared import Prepared


def out_projection_reference(
    x_TF: Tensor,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    *,
    gelu: bool,
    norm: SubNorm | None,
    residual_TD: Tensor,
    factor_T: Tensor,
) -> Tensor:
    """Computes `out_projection` in plain PyTorch, for a rank that holds all columns of a row."""
    parts = []
    for i, (start, stop) in enumerate(slices):
        a = F.gelu(x_TF[start:stop]) if gelu else x_TF[start:stop]
        if norm is not None:
            a = F.layer_norm(a, a.shape[1:], norm.scales[i], norm.shifts[i], norm.epsilon)
        parts.append(F.linear(a, weights[i], biases[i]))
    return residual_TD + factor_T.unsqueeze(1) * torch.cat(parts).to(residual_TD.dtype)


def out_projection(
    activation: Activation,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    gelu: bool,
    norm: SubNorm | None = None,
    residual_TD: Tensor | None = None,
    factor_T: Tensor | None = None,
) -> Tensor:
    """Computes residual + factor * (LN(GELU(x)) @ w.T + b), each row with its own expert's parameters.

    If tensor-parallel ranks divide the columns of x, call the op without biases, residual and factor. Sum the ranks'
    results, and pass the sum to `residual_add` with the biases, residual and factor. If the columns are divided, a
    sub-LN gathers two floats per row from each rank, and all-reduces two floats per row in the backward pass.

    Args:
        activation: input x_TF, and GELU(x_TF) if `up_projection` has computed it. Only x_TF is saved.
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: one matrix (D, F) per expert in x's dtype, for output width D and input width F.
        biases: one vector (D,) per expert; empty for no biases.
        gelu: whether to apply the exact (erf) GELU first.
        norm: sub-LN, or None. Its parameters are saved without copies, like the weights.
        residual_TD: residual stream to which the branch is added, or None.
        factor_T: factor of stochastic depth for each row of the branch; None means 1. It gets no gradient.

    Returns:
        y_TD, in the residual's dtype (x's dtype or float32). Without a residual, y_TD is in x's dtype.
    """
    form = _Form(ends_of(slices), gelu, norm, len(biases) > 0, residual_TD is not None)
    parameters = (*weights, *biases, *(() if norm is None else (*norm.scales, *norm.shifts)))
    return _OutProjection.apply(form, activation, residual_TD, factor_T, activation.x_TF.contiguous(), *parameters)


_MATMUL_ROWS = 2048  # rows per matrix product on a CPU; more rows need larger buffers, and fewer rows are slower


class _Parameters(NamedTuple):
    """Holds the parameters of one call. Each field has one tensor per expert, or is empty."""

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]  # empty in the backward pass
    scales: tuple[Tensor, ...]
    shifts: tuple[Tensor, ...]


class _Form(NamedTuple):
    """Holds the settings of one call of `out_projection`."""

    ends: tuple[int, ...]
    gelu: bool
    norm: SubNorm | None
    has_biases: bool
    has_residual: bool

    @property
    def needs_no_communication(self) -> bool:
        """Returns whether the op does not communicate: it has no sub-LN, or this rank holds all columns of a row."""
        return self.norm is None or self.norm.all_gather is None

    def split(self, parameters: tuple[Tensor, ...], has_biases: bool) -> _Parameters:
        """Splits one tuple of all parameters into weights, biases (if `has_biases` is true), scales and shifts."""
        size, start = len(self.ends), (1 + has_biases) * len(self.ends)
        return _Parameters(
            parameters[:size], parameters[size:start], parameters[start : start + size], parameters[start + size :]
        )


_SavedNorm = tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]
"""Tensors of a sub-LN that are saved for the backward pass: statistics from `_normalize`, scales, shifts."""


class _OutProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        form: _Form,
        activation: Activation,
        residual_TD: Tensor | None,
        factor_T: Tensor | None,
        x_TF: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        weights, biases, scales, shifts = form.split(parameters, form.has_biases)
        statistics: list[Tensor] = []
        by_operators = KERNELS.accept(x_TF) or not form.needs_no_communication
        if by_operators:
            n_TF = activation.a_TF if activation.a_TF is not None else _activate(x_TF, form.gelu)
            if form.norm is not None:
                n_TF, *statistics = _normalize(x_TF, form, scales, shifts)
            y_TD = OUT_PROJECTION(n_TF, form.ends, weights, biases, residual_TD, factor_T)
        else:
            y_TD = _forward_cpu(x_TF, form, weights, biases, residual_TD, factor_T)
        # Saves the matrices, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(x_TF, factor_T, *statistics, *weights, *scales, *shifts)
        ctx.form, ctx.by_operators, ctx.num_statistics = form, by_operators, len(statistics)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
        form: _Form = ctx.form
        saved, start = ctx.saved_tensors, 2 + ctx.num_statistics
        (x_TF, factor_T), statistics, parameters = saved[:2], saved[2:start], saved[start:]
        weights, _, scales, shifts = form.split(parameters, has_biases=False)
        dy_TD = dy_TD.contiguous()
        if ctx.by_operators:
            # A product takes one dtype, so a float32 gradient of the residual stream is rounded once, before them.
            of_branch = dy_TD.to(x_TF.dtype), None if factor_T is None else factor_T.to(x_TF.dtype)
            norm = None if form.norm is None else (statistics, scales, shifts)
            gradients = _backward_by_operators(*of_branch, x_TF, form, weights, norm)
        else:
            saved_norm = None if form.norm is None else form.norm._replace(scales=scales, shifts=shifts)
            gradients = _backward_cpu(dy_TD, factor_T, x_TF, form._replace(norm=saved_norm), weights)
        return (None, None, dy_TD if form.has_residual else None, None, *gradients)


def _forward_cpu(
    x_TF: Tensor,
    form: _Form,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual_TD: Tensor | None,
    factor_T: Tensor | None,
) -> Tensor:
    y_TD = ALLOCATOR.empty(x_TF, len(x_TF), len(weights[0]))
    for i, start, stop in _row_blocks(form):
        _, n_RF, _ = _normalize_cpu(x_TF[start:stop], form, i)
        matmul(n_RF, weights[i], biases[i] if biases else None, y_TD[start:stop])
    return _join(y_TD, residual_TD, factor_T)


def _backward_cpu(
    dy_TD: Tensor, factor_T: Tensor | None, x_TF: Tensor, form: _Form, weights: Sequence[Tensor]
) -> list[Tensor]:
    """Returns the gradients of x and of all weights, biases, scales and shifts. `dy_TD` is the op's output gradient."""
    dx_TF, of_weights = ALLOCATOR.empty_like(x_TF), [ALLOCATOR.empty_like(w, lasting=True) for w in weights]
    of_biases: list[list[Tensor]] = [[] for _ in weights]
    of_norms: list[list[Tensor]] = [[] for _ in weights]  # scale and shift
    for i, start, stop in _row_blocks(form):
        x_RF, dx_RF = x_TF[start:stop], dx_TF[start:stop]
        d_RD = scale_rows(dy_TD[start:stop], None if factor_T is None else factor_T[start:stop]).to(x_TF.dtype)
        a_RF, n_RF, statistics = _normalize_cpu(x_RF, form, i, keeps_activated=True)
        of_weights[i].addmm_(d_RD.t(), n_RF, beta=0 if start == slices_of(form.ends)[i][0] else 1)
        if form.has_biases:
            of_biases[i] = accumulate(of_biases[i], [d_RD.sum(0)])
        dn_RF = matmul(d_RD, weights[i].t(), None, dx_RF if form.norm is None else n_RF)  # n is no longer needed
        length = chunk_rows(x_RF)
        chunks = zip(*(rows.split(length) for rows in (dn_RF, a_RF, x_RF, dx_RF)), strict=True)
        for number, (dn, a, x, dx) in enumerate(chunks):
            da = dn
            if form.norm is not None:
                scale, shift = form.norm.scales[i], form.norm.shifts[i]
                da, *of_norm = torch.ops.aten.native_layer_norm_backward(
                    dn, a, scale.shape, *statistics[number], scale, shift, [True, True, True]
                )
                of_norms[i] = accumulate(of_norms[i], of_norm)
            if form.gelu:
                torch.ops.aten.gelu_backward.grad_input(da, x, grad_input=dx)
            elif form.norm is not None:
                dx.copy_(da)
    totals = [[*of_bias, *of_norm] for of_bias, of_norm in zip(of_biases, of_norms, strict=True)]
    by_kind = [total.to(x_TF.dtype) for kind in zip(*totals, strict=True) for total in kind]
    return [dx_TF, *of_weights, *by_kind]


def _normalize_cpu(
    x_RF: Tensor, form: _Form, i: int, keeps_activated: bool = False
) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Returns GELU(x), LN(GELU(x)) and the statistics of LN for expert `i`.

    The statistics are [mean, 1 / standard deviation] per chunk of rows. If `form.norm` is None, there is no LN. If
    `form.gelu` is false, there is no GELU. If both LN and GELU are applied and `keeps_activated` is false, LN
    overwrites GELU(x), and the first two results are the same tensor.
    """
    norm = form.norm
    n_RF = ALLOCATOR.empty_like(x_RF) if form.gelu or norm is not None else x_RF
    a_RF = n_RF if form.gelu else x_RF
    if keeps_activated and form.gelu and norm is not None:
        a_RF = ALLOCATOR.empty_like(x_RF)
    statistics, length = [], chunk_rows(x_RF)
    for x, a, n in zip(x_RF.split(length), a_RF.split(length), n_RF.split(length), strict=True):
        if form.gelu:
            torch.ops.aten.gelu.out(x, out=a)
        if norm is not None:
            scale, shift = norm.scales[i], norm.shifts[i]
            normalized, *of_chunk = torch.native_layer_norm(a, scale.shape, scale, shift, norm.epsilon)
            n.copy_(normalized)
            statistics.append(of_chunk)
    return a_RF, n_RF, statistics


def _row_blocks(form: _Form) -> Iterator[tuple[int, int, int]]:
    """Yields expert index, first row and stop row of each block of rows. An expert without rows has one empty block."""
    for i, (start, stop) in enumerate(slices_of(form.ends)):
        for first in range(start, max(stop, start + 1), _MATMUL_ROWS):
            yield i, first, min(first + _MATMUL_ROWS, stop)


def _normalize(x_TF: Tensor, form: _Form, scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns LN(GELU(x)), or LN(x) without `form.gelu`. Also returns the mean and 1 / standard deviation of each row.

    Mean and 1 / standard deviation are one tensor (2, T). If ranks divide the columns of a row, they are two tensors
    (T,), and this rank gathers two numbers per row from each rank.
    """
    norm = form.norm
    assert norm is not None
    if form.needs_no_communication:
        n_TF, statistics_2T = ACTIVATION_NORM(x_TF, form.gelu, scales, shifts, norm.epsilon, form.ends)
        return n_TF, statistics_2T
    mean_T, squares_T = ROW_STATISTICS(x_TF, form.gelu)
    mean_T, rstd_T = norm.join_statistics(mean_T, squares_T, x_TF.shape[1])
    return SUB_NORM(x_TF, form.gelu, mean_T, rstd_T, scales, shifts, form.ends), mean_T, rstd_T


def _renormalize(x_TF: Tensor, form: _Form, norm: _SavedNorm) -> Tensor:
    """Recomputes LN(GELU(x)) from saved statistics, without communication."""
    statistics, scales, shifts = norm
    if form.needs_no_communication:
        return _normalize(x_TF, form, scales, shifts)[0]
    n_TF: Tensor = SUB_NORM(x_TF, form.gelu, *statistics, scales, shifts, form.ends)
    return n_TF


def _backward_by_operators(
    dy_TD: Tensor,
    factor_T: Tensor | None,
    x_TF: Tensor,
    form: _Form,
    weights: Sequence[Tensor],
    norm: _SavedNorm | None,
) -> list[Tensor]:
    """Returns the same gradients as `_backward_cpu`, but each operation computes all rows, not one block of rows.

    If the columns of the norm are split over ranks, this function all-reduces two sums per row.
    """
    ends = form.ends
    if norm is None or form.norm is None:
        of_linear = MULTIWAY_WEIGHT_GRADIENT(dy_TD, factor_T, _activate(x_TF, form.gelu), ends, form.has_biases)
        dn_TF = MULTIWAY_INPUT_GRADIENT(dy_TD, factor_T, ends, weights)
        return [torch.ops.aten.gelu_backward(dn_TF, x_TF) if form.gelu else dn_TF, *of_linear]
    statistics, scales, _ = norm
    n_TF = _renormalize(x_TF, form, norm)
    of_linear = MULTIWAY_WEIGHT_GRADIENT(dy_TD, factor_T, n_TF, ends, form.has_biases)
    del n_TF  # frees memory for the gradient
    dn_TF = MULTIWAY_INPUT_GRADIENT(dy_TD, factor_T, ends, weights)
    if form.needs_no_communication:
        dx_TF, of_norm_2EF = ACTIVATION_NORM_BACKWARD(dn_TF, x_TF, form.gelu, *statistics, scales, ends)
        return [dx_TF, *of_linear, *of_norm_2EF.view(-1, x_TF.shape[1]).unbind()]
    sums_2T, *of_norm = SUB_NORM_SUMS(dn_TF, x_TF, form.gelu, *statistics, scales, ends)
    if form.norm.all_reduce is not None:
        sums_2T = form.norm.all_reduce(sums_2T)
    arguments = (*statistics, scales, sums_2T, form.norm.width, ends)
    return [SUB_NORM_GRADIENT(dn_TF, x_TF, form.gelu, *arguments), *of_linear, *of_norm]


def _activate(x_TF: Tensor, gelu: bool) -> Tensor:
    return F.gelu(x_TF) if gelu else x_TF


def _join(y_TD: Tensor, residual_TD: Tensor | None, factor_T: Tensor | None) -> Tensor:
    """Returns residual + factor * y, without operands that are None.

    The result overwrites y, unless the residual has another dtype than y.
    """
    if residual_TD is not None and residual_TD.dtype != y_TD.dtype:
        y_TD = ALLOCATOR.empty(y_TD, *y_TD.shape, dtype=residual_TD.dtype).copy_(y_TD)
    if factor_T is not None:
        y_TD.mul_(factor_T.unsqueeze(1))
    return y_TD if residual_TD is None else y_TD.add_(residual_TD)


def _out_projection(
    n_TF: Tensor,
    ends: tuple[int, ...],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual_TD: Tensor | None,
    factor_T: Tensor | None,
) -> Tensor:
    """Computes residual + factor * (n @ w.T + b): one matrix product per expert, then one pass over the output."""
    y_TD: Tensor = MULTIWAY_LINEAR(n_TF, ends, weights, biases)
    if residual_TD is None or factor_T is None:
        return _join(y_TD, residual_TD, factor_T)
    return torch.addcmul(residual_TD, y_TD.to(residual_TD.dtype), factor_T.unsqueeze(1))


@Prepared
def _out_projection_triton(n_TF: Tensor, ends: tuple[int, ...], *rest: Any) -> Callable[..., Tensor]:
    from beit3_ds.kernels.triton.multiway_ffn_launch import out_projection  # Triton is needed on a GPU only

    return out_projection.prepare(n_TF, slices_of(ends), *rest)


OUT_PROJECTION = MeasuredOp(
    "out_projection",
    {"triton": _out_projection_triton, "library": _out_projection},
    on_cpu=_out_projection,
    accepts={"triton": lambda n_TF, *_: KERNELS.accept(n_TF)},
)
"""Operator with the arguments of `_out_projection`; uses the fastest implementation on a GPU."""


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernel with plain PyTorch: once with bias, factor and residual, and once with none of them.

    If `dtype` is not float32, both comparisons run again, the first one with a float32 residual stream.

    Raises:
        WrongResultError: if a result is wrong.
    """
    for stream in dict.fromkeys((dtype, torch.float32)):
        _check_kernels(device, dtype, stream)


KERNELS: TrustedKernels = TrustedKernels("out_projection", check_kernels)
"""Decides whether `out_projection` may use its Triton kernel. A check at the first use on a device must pass."""


def _check_kernels(device: torch.device, dtype: torch.dtype, stream: torch.dtype) -> None:
    from beit3_ds.kernels.triton import multiway_ffn_launch as launch

    slices, generator = [(0, 130), (130, 137)], torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    n, residual, factor = draw(137, 96), draw(137, 64).to(stream), draw(137).to(stream)
    weights, biases = [draw(64, 96, scale=0.1) for _ in slices], [draw(64) for _ in slices]

    def whole(n: Tensor, residual: Tensor, factor: Tensor, *p: Tensor) -> tuple[Tensor, ...]:
        stream = {"residual_TD": residual, "factor_T": factor}
        return (out_projection_reference(n, slices, p[:2], p[2:4], gelu=False, norm=None, **stream),)

    y = launch.out_projection(n, slices, weights, biases, residual, factor)
    check_against_reference(("y",), (y,), whole, (n, residual, factor, *weights, *biases))
    partial = launch.out_projection(n, slices, weights, [], None, None)
    plain = lambda n, *w: (torch.cat([F.linear(n[i:j], w[k]) for k, (i, j) in enumerate(slices)]),)  # noqa: E731
    check_against_reference(("partial",), (partial,), plain, (n, *weights))
