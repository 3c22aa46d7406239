"""Launches the kernels that add a branch (attention or FFN) to the residual stream; lists their variants."""

# T packed rows, D width, E experts, P programs.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable, Sequence
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
from beit3_ds.kernels.triton.residual_add import backward_kernel, forward_kernel
from beit3_ds.kernels.triton.variant import KernelVariant


@Prepared
def forward(
    residual_TD: Tensor,
    partial_TD: Tensor,
    stops: Sequence[int],
    biases: Sequence[Tensor],
    factor_T: Tensor | None,
    tiling: RowTiling,
) -> Callable[..., Tensor]:
    """Prepares the computation of y_TD = residual + factor * (partial + bias), with the bias of each row's expert.

    Args:
        residual_TD: residual stream, contiguous.
        partial_TD: branch without its bias, contiguous.
        stops: stop row of each expert; expert 0 starts at row 0.
        biases: one vector (D,) per expert.
        factor_T: factor of each row, contiguous; None means 1.
        tiling: compile and launch settings of the kernel.

    Returns:
        Function that computes y_TD. A call of the decorated name (`Prepared`) prepares and computes in one step.
    """
    flags = (factor_T is not None,)
    programs, launch = prepare_rows(_FORWARD, tuple(stops), residual_TD.shape[1], tiling, flags)

    def run(
        residual_TD: Tensor,
        partial_TD: Tensor,
        stops: Any,
        biases: Sequence[Tensor],
        factor_T: Tensor | None,
        *rest: Any,
    ) -> Tensor:
        y_TD = torch.empty_like(residual_TD)
        factors = residual_TD if factor_T is None else factor_T  # not read if None
        check_rows(residual_TD, partial_TD, factors, *biases)
        if programs.num_programs:
            launch(residual_TD, partial_TD, *for_experts(biases), factors, y_TD)
        return y_TD

    return run


@Prepared
def backward(
    dy_TD: Tensor, stops: Sequence[int], factor_T: Tensor | None, tiling: RowTiling, dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Prepares the computation of the gradients of the branch and of the biases. The kernel uses no atomics, so results
    are deterministic.

    Args:
        dy_TD: gradient of y, contiguous.
        stops: stop row of each expert; expert 0 starts at row 0.
        factor_T: factor of each row, contiguous; None means 1.
        tiling: compile and launch settings of the kernel.
        dtype: dtype of the branch and of the results.

    Returns:
        Function that computes the branch's gradient d_partial_TD, and the gradients of the biases, (E, D). A call of
        the decorated name (`Prepared`) prepares and computes in one step. If `factor_T` is None, d_partial_TD is not
        computed and has no rows, because the branch's gradient is dy_TD itself.
    """
    width, flags = dy_TD.shape[1], (factor_T is not None,)
    programs, launch = prepare_rows(_BACKWARD, tuple(stops), width, tiling, flags, is_backward=True)
    add_programs = prepare_sum(programs, 1, len(stops), width, dtype)

    def run(dy_TD: Tensor, stops: Any, factor_T: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        d_partial_TD = torch.empty_like(dy_TD if factor_T is not None else dy_TD[:0], dtype=dtype)
        sum_1PD = dy_TD.new_empty(1, programs.num_programs, width, dtype=torch.float32)
        factors = dy_TD if factor_T is None else factor_T  # not read if None
        check_rows(dy_TD, factors)
        if programs.num_programs:
            launch(dy_TD, factors, d_partial_TD, sum_1PD)
        return d_partial_TD, add_programs(sum_1PD)[0]

    return run


_FORWARD = KernelLauncher(forward_kernel)
_BACKWARD = KernelLauncher(backward_kernel)


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants to compile ahead of time: the forward and the backward kernel, each with and without a
    factor per row, for several widths and dtypes.
    """
    cases = [
        ("bf16", 768),
        ("bf16", 1024),
        ("bf16", 1408),
        ("fp16", 768),
        ("fp16", 1024),
        ("fp16", 1408),
        ("fp32", 768),
    ]
    # A float32 residual stream has a float32 gradient and float32 factors.
    stream = dict.fromkeys(("residual_ptr", "factor_ptr", "y_ptr", "dy_ptr"), "fp32")
    mixed = [
        build_row_variant(
            architecture, "residual_add", kernel, "bf16", width, {"FACTOR": factor}, f"{note} fp32 stream", stream
        )
        for width in (768, 1024, 1408)
        for kernel in (forward_kernel, backward_kernel)
        for factor, note in ((True, ""), (False, " alone"))
    ]
    return mixed + [
        build_row_variant(architecture, "residual_add", kernel, *case, {"FACTOR": factor}, "" if factor else " alone")
        for case in cases
        for kernel in (forward_kernel, backward_kernel)
        for factor in (True, False)
    ]
