"""Computes GELU and sub-LN before an output projection, if tensor-parallel ranks divide the columns of a row.

The sub-LN (Magneto, Wang et al., 2022, arXiv:2210.06423) normalises the input of an output projection: the FFN's
activations, or attention's merged heads. Mean and variance cover all columns of a row. So ranks exchange two numbers
per row in the forward pass, and two in the backward pass. For the backward pass, only the mean and 1 / standard
deviation of each row are saved, not the normalised rows. A rank that holds all columns uses `activation_norm` instead.
"""

# T packed rows, F local width, P ranks that divide the width.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import slices_of
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.self_check import TrustedKernels


class SubNorm(NamedTuple):
    """Holds one LayerNorm per expert, and the collectives of P ranks. Each rank has a part of every row's columns."""

    scales: Sequence[Tensor]
    """One scale (F,) per expert, for the F columns of this rank."""
    shifts: Sequence[Tensor]
    """One shift (F,) per expert, for the F columns of this rank."""
    epsilon: float
    """Value added to the variance."""
    width: int
    """Columns per row on all ranks together."""
    all_gather: Callable[[Tensor], Tensor] | None = None
    """Function that gathers a tensor from each of P ranks and stacks them, (P, ...); None if this rank holds all
    columns."""
    all_reduce: Callable[[Tensor], Tensor] | None = None
    """Function that sums a tensor over P ranks; None if this rank holds all columns."""

    def join_statistics(self, mean_T: Tensor, squares_T: Tensor, local_width: int) -> tuple[Tensor, Tensor]:
        """Combines the ranks' statistics into the mean and 1 / standard deviation of each row over all columns.

        Gathers two floats per row from each rank. Each rank's sum of squared deviations from its own mean is converted
        to the sum of squared deviations from the common mean (Chan et al., 1979). This method avoids the cancellation
        in E[x^2] - E[x]^2.

        Args:
            mean_T: mean of each row over this rank's columns.
            squares_T: sum of the squared deviations from `mean_T`, over this rank's columns.
            local_width: number of columns on each rank.
        """
        if self.all_gather is not None:
            means_PT, squares_PT = self.all_gather(torch.stack([mean_T, squares_T])).unbind(1)
            mean_T = means_PT.mean(0)
            squares_T = squares_PT.sum(0) + local_width * (means_PT - mean_T).square().sum(0)
        return mean_T, (squares_T / self.width + self.epsilon).rsqrt()


def _row_statistics(x_TF: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Computes two statistics of each row of GELU(x), or of x: the mean, and the sum of squared deviations from it.

    Returns two tensors (T,), in the dtype that `wide_dtype` gives.
    """
    wide_TF = _widen(F.gelu(x_TF) if gelu else x_TF)
    mean_T = wide_TF.mean(1)
    return mean_T, (wide_TF - mean_T.unsqueeze(1)).square_().sum(1)


def _sub_norm(
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    ends: tuple[int, ...],
) -> Tensor:
    """Computes LN(GELU(x)), or LN(x) if `gelu` is false, from given statistics of each row."""
    n_TF = _standardize(x_TF, gelu, mean_T, rstd_T)
    for (start, stop), scale, shift in zip(slices_of(ends), scales, shifts, strict=True):
        n_TF[start:stop].mul_(scale).add_(shift)
    return n_TF.to(x_TF.dtype)


def _sub_norm_sums(
    dn_TF: Tensor,
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    ends: tuple[int, ...],
) -> list[Tensor]:
    """Computes two sums per row over this rank's columns, and the gradients of scales and shifts.

    The first sum is over dn * scale. The second sum is over dn * scale * xhat, where xhat is the standardised row.

    Returns:
        The two sums, (2, T) in the dtype of the statistics. Then the gradients of all scales, then of all shifts.
    """
    standard_TF, sums_2T = _standardize(x_TF, gelu, mean_T, rstd_T), mean_T.new_empty(2, len(x_TF))
    d_scales, d_shifts = [], []
    for (start, stop), scale in zip(slices_of(ends), scales, strict=True):
        d_TF = _widen(dn_TF[start:stop])
        product_TF = d_TF * standard_TF[start:stop]
        d_scales.append(product_TF.sum(0).to(scale.dtype))
        d_shifts.append(d_TF.sum(0).to(scale.dtype))
        sums_2T[0, start:stop] = d_TF @ _widen(scale)
        sums_2T[1, start:stop] = product_TF @ _widen(scale)
    return [sums_2T, *d_scales, *d_shifts]


def _sub_norm_gradient(
    dn_TF: Tensor,
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    sums_2T: Tensor,
    width: int,
    ends: tuple[int, ...],
) -> Tensor:
    """Computes the gradient of x from the sums of `_sub_norm_sums`.

    The sums must already be added over all ranks, so that they cover the row's `width` columns.
    """
    standard_TF, d_TF = _standardize(x_TF, gelu, mean_T, rstd_T), _widen(dn_TF)
    d_mean_T1, d_deviation_T1 = (sums_2T / width).unsqueeze(2).unbind(0)
    da_TF = standard_TF.mul_(d_deviation_T1).add_(d_mean_T1).neg_()
    for (start, stop), scale in zip(slices_of(ends), scales, strict=True):
        da_TF[start:stop].addcmul_(d_TF[start:stop], _widen(scale))
    da_TF = da_TF.mul_(rstd_T.unsqueeze(1)).to(x_TF.dtype)
    return torch.ops.aten.gelu_backward(da_TF, x_TF) if gelu else da_TF


def _row_statistics_triton(x_TF: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    from beit3_ds.kernels.triton.sub_norm_launch import row_statistics  # Triton is needed on a GPU only

    return row_statistics(x_TF, gelu)


def _sub_norm_triton(
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    shifts: Sequence[Tensor],
    ends: tuple[int, ...],
) -> Tensor:
    from beit3_ds.kernels.triton.sub_norm_launch import normalize

    return normalize(x_TF, gelu, (mean_T, rstd_T, scales, shifts), slices_of(ends))


def _sub_norm_sums_triton(
    dn_TF: Tensor,
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    ends: tuple[int, ...],
) -> list[Tensor]:
    from beit3_ds.kernels.triton.sub_norm_launch import norm_gradient_sums

    norm = (mean_T, rstd_T, scales, list[Tensor]())
    sums_2T, d_scales, d_shifts = norm_gradient_sums(dn_TF, x_TF, gelu, norm, slices_of(ends))
    return [sums_2T, *d_scales, *d_shifts]


def _sub_norm_gradient_triton(
    dn_TF: Tensor,
    x_TF: Tensor,
    gelu: bool,
    mean_T: Tensor,
    rstd_T: Tensor,
    scales: Sequence[Tensor],
    sums_2T: Tensor,
    width: int,
    ends: tuple[int, ...],
) -> Tensor:
    from beit3_ds.kernels.triton.sub_norm_launch import norm_gradient

    norm = (mean_T, rstd_T, scales, list[Tensor]())
    return norm_gradient(dn_TF, x_TF, gelu, norm, sums_2T, width, slices_of(ends))


def _takes_triton(x: Tensor, *rest: Any) -> bool:
    return KERNELS.accept(x)


ROW_STATISTICS = MeasuredOp(
    "row_statistics",
    {"triton": _row_statistics_triton, "library": _row_statistics},
    on_cpu=_row_statistics,
    accepts={"triton": _takes_triton},
)
"""Operator for the statistics of each row, with the arguments of `_row_statistics`. Uses the fastest implementation on
a GPU."""
SUB_NORM = MeasuredOp(
    "sub_norm", {"triton": _sub_norm_triton, "library": _sub_norm}, on_cpu=_sub_norm, accepts={"triton": _takes_triton}
)
"""Operator for the normalised rows, with the arguments of `_sub_norm`. Uses the fastest implementation on a GPU."""
SUB_NORM_SUMS = MeasuredOp(
    "sub_norm_sums",
    {"triton": _sub_norm_sums_triton, "library": _sub_norm_sums},
    on_cpu=_sub_norm_sums,
    accepts={"triton": _takes_triton},
)
"""Operator for the gradients of scales and shifts, and for two sums per row that the input gradient needs. Takes the
arguments of `_sub_norm_sums`. Uses the fastest implementation on a GPU."""
SUB_NORM_GRADIENT = MeasuredOp(
    "sub_norm_gradient",
    {"triton": _sub_norm_gradient_triton, "library": _sub_norm_gradient},
    on_cpu=_sub_norm_gradient,
    mutates=(0,),
    accepts={"triton": _takes_triton},
)
"""Operator for the input gradient, with the arguments of `_sub_norm_gradient`. Uses the fastest implementation on a
GPU. The result may overwrite `dn_TF`."""


def wide_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype for statistics of `x`: float32 if `x` is in half precision, otherwise the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)


def _widen(x: Tensor) -> Tensor:
    return x.to(wide_dtype(x))


def _standardize(x_TF: Tensor, gelu: bool, mean_T: Tensor, rstd_T: Tensor) -> Tensor:
    """Returns (GELU(x) - mean) * rstd, or (x - mean) * rstd if `gelu` is false, as a new tensor."""
    a_TF = _widen(F.gelu(x_TF) if gelu else x_TF)
    return (a_TF - mean_T.unsqueeze(1)).mul_(rstd_T.unsqueeze(1))


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernels with plain PyTorch for two experts, with and without GELU.

    Raises:
        WrongResultError: if a result is wrong.
    """
    from beit3_ds.kernels.triton import sub_norm_launch as launch

    slices, ends = [(0, 130), (130, 137)], (130, 137)
    generator = torch.Generator().manual_seed(0)
    x, dn = (torch.randn(137, 96, generator=generator).to(device, dtype) for _ in range(2))
    scales, shifts = ([torch.randn(96, generator=generator).to(device, dtype) for _ in slices] for _ in range(2))
    for gelu in (False, True):
        statistics = launch.row_statistics(x, gelu)
        check_against_reference(("mean", "squares"), statistics, partial(_row_statistics, gelu=gelu), (x,))
        mean, squares = _row_statistics(x, gelu)
        rstd = (squares / 96 + 1e-5).rsqrt()
        sums = _sub_norm_sums(dn, x, gelu, mean, rstd, scales, ends)[0]
        norm = (mean, rstd, scales, shifts)
        n = launch.normalize(x, gelu, norm, slices)
        check_against_reference(("n",), (n,), partial(_check_norm, gelu, ends), (x, mean, rstd, *scales, *shifts))
        sums_2T, d_scales, d_shifts = launch.norm_gradient_sums(dn, x, gelu, norm, slices)
        names = ("sums", *(f"d_{kind} {expert}" for kind in ("scale", "shift") for expert in range(2)))
        results = (sums_2T, *d_scales, *d_shifts)
        check_against_reference(names, results, partial(_check_sums, gelu, ends), (dn, x, mean, rstd, *scales))
        dx = launch.norm_gradient(dn.clone(), x, gelu, norm, sums, 96, slices)
        check_against_reference(
            ("dx",), (dx,), partial(_check_gradient, gelu, ends), (dn, x, mean, rstd, sums, *scales)
        )


KERNELS = TrustedKernels("sub_norm", check_kernels)
"""Decides whether the Triton kernels for GELU and sub-LN may be used. A check at the first use on a device must pass.
"""


def _check_norm(
    gelu: bool, ends: tuple[int, ...], x_TF: Tensor, mean_T: Tensor, rstd_T: Tensor, *p: Tensor
) -> tuple[Tensor, ...]:
    return (_sub_norm(x_TF, gelu, mean_T, rstd_T, p[: len(ends)], p[len(ends) :], ends),)


def _check_sums(
    gelu: bool, ends: tuple[int, ...], dn_TF: Tensor, x_TF: Tensor, mean_T: Tensor, rstd_T: Tensor, *scales: Tensor
) -> tuple[Tensor, ...]:
    return tuple(_sub_norm_sums(dn_TF, x_TF, gelu, mean_T, rstd_T, scales, ends))


def _check_gradient(
    gelu: bool,
    ends: tuple[int, ...],
    dn_TF: Tensor,
    x_TF: Tensor,
    mean_T: Tensor,
    rstd_T: Tensor,
    sums_2T: Tensor,
    *scales: Tensor,
) -> tuple[Tensor, ...]:
    return (_sub_norm_gradient(dn_TF, x_TF, gelu, mean_T, rstd_T, scales, sums_2T, x_TF.shape[1], ends),)
