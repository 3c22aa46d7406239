"""Computes GELU and sub-LN of rows in one pass, and the gradients in a second pass.

The sub-LN (Magneto, Wang et al., 2022, arXiv:2210.06423) normalises the input of an output projection. This module
needs whole rows. If tensor-parallel ranks divide the columns of a row, `sub_norm` is used instead. On a CPU,
`out_projection` computes GELU and sub-LN itself, and only self-checks use this module's operators.
"""

# T packed rows, F width, E experts.

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops.expert_rows import WIDEST, row_tiling
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.multiway_linear import slices_of
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.prepared import Prepared


def _forward(
    x_TF: Tensor, gelu: bool, scales: Sequence[Tensor], shifts: Sequence[Tensor], epsilon: float, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Computes LN(GELU(x)), or LN(x) if `gelu` is false. Each row is scaled and shifted by its expert.

    Returns:
        The normalised rows, (T, F) in x's dtype. Then the mean and 1 / standard deviation of each row, (2, T) in
        float32, or in float64 for float64 rows.
    """
    a_TF, n_TF = F.gelu(x_TF) if gelu else x_TF, torch.empty_like(x_TF)
    statistics_2T = x_TF.new_empty(2, len(x_TF), dtype=_wide(x_TF))
    for (start, stop), scale, shift in zip(slices_of(ends), scales, shifts, strict=True):
        n, *of_rows = torch.native_layer_norm(a_TF[start:stop], scale.shape, scale, shift, epsilon)
        n_TF[start:stop] = n
        statistics_2T[:, start:stop] = torch.stack(of_rows).squeeze(2)
    return n_TF, statistics_2T


def _backward(
    dn_TF: Tensor, x_TF: Tensor, gelu: bool, statistics_2T: Tensor, scales: Sequence[Tensor], ends: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Computes gradients from `dn_TF`, the gradient of the normalised rows. The Triton kernel overwrites `dn_TF`.

    Returns:
        The gradient of x, (T, F), and the gradients of scales and shifts, (2, E, F).
    """
    a_TF, da_TF = F.gelu(x_TF) if gelu else x_TF, torch.empty_like(x_TF)
    d_parameters_2EF = x_TF.new_empty(2, len(ends), x_TF.shape[1])
    # PyTorch's statistics have the dtype of the rows on a CPU, and are float32 for half precision on a GPU.
    of_rows_2T = statistics_2T if x_TF.is_cuda else statistics_2T.to(x_TF.dtype)
    for expert, ((start, stop), scale) in enumerate(zip(slices_of(ends), scales, strict=True)):
        mean_T1, rstd_T1 = of_rows_2T[:, start:stop].unsqueeze(2).unbind()
        # Only the presence of a shift matters, not its values, so the scale is passed in its place.
        da, *of_parameters = torch.ops.aten.native_layer_norm_backward(
            dn_TF[start:stop], a_TF[start:stop], scale.shape, mean_T1, rstd_T1, scale, scale, [True, True, True]
        )
        da_TF[start:stop] = da
        d_parameters_2EF[:, expert] = torch.stack(of_parameters)
    return torch.ops.aten.gelu_backward(da_TF, x_TF) if gelu else da_TF, d_parameters_2EF


@Prepared
def _forward_triton(
    x_TF: Tensor, gelu: bool, scales: Sequence[Tensor], shifts: Sequence[Tensor], epsilon: float, ends: tuple[int, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_layer_norm_launch import forward  # Triton is needed on a GPU only

    run = forward.prepare(x_TF, ends, scales, shifts, epsilon, row_tiling(x_TF), gelu)
    return lambda x_TF, gelu, scales, shifts, epsilon, ends: run(x_TF, ends, scales, shifts)


@Prepared
def _backward_triton(
    dn_TF: Tensor, x_TF: Tensor, gelu: bool, statistics_2T: Tensor, scales: Sequence[Tensor], ends: tuple[int, ...]
) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.multiway_layer_norm_launch import backward

    tiling = row_tiling(x_TF)
    run = backward.prepare(dn_TF, None, x_TF, statistics_2T, ends, scales, tiling, gelu, in_place=True)
    return lambda dn_TF, x_TF, gelu, statistics_2T, scales, ends: run(dn_TF, None, x_TF, statistics_2T, ends, scales)


def _takes_triton(x: Tensor, *rest: Any) -> bool:
    return x.shape[1] <= WIDEST and KERNELS.accept(x)


def _backward_takes_triton(dn: Tensor, x: Tensor, *rest: Any) -> bool:
    return _takes_triton(x)


ACTIVATION_NORM = MeasuredOp(
    "activation_norm",
    {"triton": _forward_triton, "library": _forward},
    on_cpu=_forward,
    accepts={"triton": _takes_triton},
)
"""Operator for GELU and sub-LN, with the arguments of `_forward`. Uses the fastest implementation on a GPU."""
ACTIVATION_NORM_BACKWARD = MeasuredOp(
    "activation_norm_backward",
    {"triton": _backward_triton, "library": _backward},
    on_cpu=_backward,
    mutates=(0,),
    accepts={"triton": _backward_takes_triton},
)
"""Operator for the gradients, with the arguments of `_backward`. Uses the fastest implementation on a GPU."""


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernels with PyTorch's operations for three experts; one expert has no rows.

    Raises:
        WrongResultError: if a result is wrong.
    """
    from beit3_ds.kernels.triton import multiway_layer_norm_launch as launch

    ends, generator = (37, 37, 61), torch.Generator().manual_seed(0)
    x, dn = (torch.randn(61, 200, generator=generator).to(device, dtype) for _ in range(2))
    scales, shifts = ([torch.randn(200, generator=generator).to(device, dtype) for _ in ends] for _ in range(2))
    for gelu in (False, True):
        n, statistics = launch.forward(x, ends, scales, shifts, 1e-5, row_tiling(x), gelu)
        forward = lambda x, *p, gelu=gelu: (_forward(x, gelu, p[:3], p[3:], 1e-5, ends)[0],)  # noqa: E731
        check_against_reference(("n",), (n,), forward, (x, *scales, *shifts))

        def backward(dn: Tensor, x: Tensor, *scales: Tensor, gelu: bool = gelu) -> tuple[Tensor, ...]:
            exact = _forward(x, gelu, scales, scales, 1e-5, ends)[1]
            return _backward(dn, x, gelu, exact, scales, ends)

        results = launch.backward(dn.clone(), None, x, statistics, ends, scales, row_tiling(x), gelu, in_place=True)
        check_against_reference(("dx", "d_parameters"), results, backward, (dn, x, *scales))


KERNELS = TrustedKernels("activation_norm", check_kernels)
"""Decides whether the Triton kernels for GELU and sub-LN may be used. A check at the first use on a device must pass.
"""
