"""Normalisation over a width that the tensor-parallel ranks divide."""

# T rows, F local width, P tensor-parallel size.

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from beit3_ds.parallel.tensor import TensorParallel


def normalize_split(x_TF: Tensor, epsilon: float, tensor: TensorParallel) -> Tensor:
    """Subtracts each row's mean and divides by its deviation, both taken over the whole width of all ranks.

    Statistics are taken in float32 (float64 for float64) and combined about the common mean, so that nothing cancels
    as it does in E[x^2] - E[x]^2. Communicates two floats a row: forward gathers every rank's mean and sum of squares,
    backward all-reduces two sums.

    Args:
        x_TF: this rank's columns; every rank has as many.
        epsilon: added to the variance.
        tensor: the ranks.

    Returns:
        The normalised columns (T, F), of x's dtype, without scale and shift.
    """
    normed_TF: Tensor = _NormalizeSplit.apply(x_TF, epsilon, tensor)
    return normed_TF


class _NormalizeSplit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TF: Tensor, epsilon: float, tensor: TensorParallel) -> Tensor:
        wide_TF = x_TF.to(torch.promote_types(x_TF.dtype, torch.float32))
        width = x_TF.shape[1]
        mean_T = wide_TF.mean(1)
        squares_T = (wide_TF - mean_T.unsqueeze(1)).square().sum(1)
        means_PT, squares_PT = tensor.all_gather(torch.stack([mean_T, squares_T])).unbind(1)
        mean_T = means_PT.mean(0)
        squares_T = squares_PT.sum(0) + width * (means_PT - mean_T).square().sum(0)
        rstd_T1 = (squares_T / (width * tensor.size) + epsilon).rsqrt().unsqueeze(1)
        normed_TF = ((wide_TF - mean_T.unsqueeze(1)) * rstd_T1).to(x_TF.dtype)
        ctx.save_for_backward(normed_TF, rstd_T1)
        ctx.tensor = tensor
        return normed_TF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_normed_TF: Tensor) -> tuple[Tensor, None, None]:
        normed_TF, rstd_T1 = ctx.saved_tensors
        dtype = d_normed_TF.dtype
        d_TF, n_TF = d_normed_TF.to(rstd_T1.dtype), normed_TF.to(rstd_T1.dtype)
        sums = ctx.tensor.all_reduce(torch.stack([d_TF.sum(1), (d_TF * n_TF).sum(1)]))
        d_mean_T1, d_scale_T1 = (sums / (d_TF.shape[1] * ctx.tensor.size)).unsqueeze(2).unbind(0)
        return (rstd_T1 * (d_TF - d_mean_T1 - n_TF * d_scale_T1)).to(dtype), None, None
