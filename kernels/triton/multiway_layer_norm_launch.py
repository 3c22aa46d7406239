"""Launches the kernels of the multiway LayerNorm, and lists the variants that are compiled ahead of time."""

# T packed rows, D width, E experts, P programs.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton.expert_rows_launch import (
    RowTiling,
    build_row_variant,
    check_rows,
    for_experts,
    prepare_rows,
    prepare_sum,
)
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher
from beit3_ds.kernels.triton.multiway_layer_norm import backward_kernel, forward_kernel
from beit3_ds.kernels.triton.variant import KernelVariant


@Prepared
def forward(
    x_TD: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    epsilon: float,
    tiling: RowTiling,
    gelu: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Prepares the computation of each expert's LayerNorm on the expert's rows.

    Args:
        x_TD: rows, contiguous, in float32 or in the parameters' dtype.
        stops: stop row of each expert; expert 0 starts at row 0.
        weights: one scale (D,) per expert. The normalised rows h have the scales' dtype.
        biases: one shift (D,) per expert.
        epsilon: value added to the variance.
        tiling: compile and launch settings of the kernel.
        gelu: whether to normalise GELU(x) instead of x.

    Returns:
        Function that computes h_TD and the statistics. A call of the decorated name (`Prepared`) prepares and computes
        in one step. The statistics are (2, T) float32: the mean of each row, then 1 / standard deviation of each row.
    """
    num_rows, dtype = len(x_TD), weights[0].dtype
    programs, launch = prepare_rows(_FORWARD, tuple(stops), x_TD.shape[1], tiling, (epsilon, gelu))

    def run(x_TD: Tensor, stops: Any, weights: Sequence[Tensor], biases: Sequence[Tensor], *rest: Any) -> Any:
        h_TD = torch.empty_like(x_TD, dtype=dtype)
        statistics_2T = x_TD.new_empty(2, num_rows, dtype=torch.float32)
        if programs.num_programs:
            check_rows(x_TD, *weights, *biases)
            launch(x_TD, *for_experts(weights), *for_experts(biases), h_TD, statistics_2T)
        return h_TD, statistics_2T

    return run


@Prepared
def backward(
    dh_TD: Tensor,
    d_residual_TD: Tensor | None,
    x_TD: Tensor,
    statistics_2T: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
    tiling: RowTiling,
    gelu: bool = False,
    *,
    in_place: bool = False,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Prepares the computation of the gradients of rows, scales and shifts. Uses no atomics, so the results are
    deterministic.

    Args:
        dh_TD: gradient of the normalised rows h, contiguous.
        d_residual_TD: gradient of the residual stream, contiguous; the kernel adds this gradient to dx. None if there
            is no such gradient.
        x_TD: see `forward`, also for stops, weights, tiling and gelu.
        statistics_2T: statistics that `forward` returned.
        in_place: whether to store dx in the memory of dh.

    Returns:
        Function that computes dx_TD, and the gradients of scales and shifts. A call of the decorated name (`Prepared`)
        prepares and computes in one step. These gradients are (2, E, D) in the scales' dtype.
    """
    (num_rows, width), flags = x_TD.shape, (d_residual_TD is not None, gelu)
    programs, launch = prepare_rows(_BACKWARD, tuple(stops), width, tiling, flags, is_backward=True, takes_count=True)
    add_programs = prepare_sum(programs, 2, len(stops), width, weights[0].dtype)

    def run(
        dh_TD: Tensor,
        d_residual_TD: Tensor | None,
        x_TD: Tensor,
        statistics_2T: Tensor,
        stops: Any,
        weights: Sequence[Tensor],
        *rest: Any,
    ) -> tuple[Tensor, Tensor]:
        dx_TD = dh_TD if in_place else torch.empty_like(x_TD)
        partial_2PD = x_TD.new_empty(2, programs.num_programs, width, dtype=torch.float32)
        if num_rows:
            d_stream_TD = d_residual_TD if d_residual_TD is not None else dh_TD  # not read if None
            check_rows(dh_TD, d_stream_TD, x_TD, *weights)
            launch(dh_TD, d_stream_TD, x_TD, statistics_2T, *for_experts(weights), dx_TD, partial_2PD)
        return dx_TD, add_programs(partial_2PD)

    return run


_FORWARD = KernelLauncher(forward_kernel)
_BACKWARD = KernelLauncher(backward_kernel)


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants to compile ahead of time: forward and backward kernels for several widths and dtypes, with
    and without GELU.
    """
    cases = [("bf16", width) for width in (768, 1024, 1408)]
    cases += [("fp16", 768), ("fp16", 1024), ("fp16", 1408), ("fp32", 768)]
    # A float32 residual stream has float32 rows and gradients; h and the parameters are narrower.
    stream = dict.fromkeys(("x_ptr", "d_residual_ptr", "dx_ptr"), "fp32")
    plain = {"GELU": False}
    forms = (
        (forward_kernel, {"EPSILON": 1e-5, **plain}, ""),
        (backward_kernel, {"RESIDUAL": True, **plain}, ""),
        (backward_kernel, {"RESIDUAL": False, **plain}, " alone"),
    )
    activated = (
        (forward_kernel, {"EPSILON": 1e-5, "GELU": True}, " gelu"),
        (backward_kernel, {"RESIDUAL": False, "GELU": True}, " gelu"),
    )
    wide = [("bf16", 3072), ("bf16", 4096), ("bf16", 6144), ("fp16", 6144), ("fp32", 3072), ("fp32", 6144)]
    build = partial(build_row_variant, architecture, "multiway_layer_norm")
    mixed = [
        build(kernel, "bf16", width, constants, " fp32 stream", stream)
        for width in (768, 1024, 1408)
        for kernel, constants, _ in forms[:2]
    ]
    narrow = [build(kernel, *case, constants, note) for case in cases for kernel, constants, note in forms]
    with_gelu = [build(kernel, *case, constants, note) for case in wide for kernel, constants, note in activated]
    return [*mixed, *narrow, *with_gelu]
