"""Launching of the LayerNorm kernels: how they are compiled, and the variants that are compiled ahead of time."""

# T packed rows, D width, E experts, P programs.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from beit3_ds.kernels.expert_rows_launch import NUM_MULTIPROCESSORS, deal_rows, for_experts, sum_partials
from beit3_ds.kernels.multiway_layer_norm_triton import backward_kernel, forward_kernel
from beit3_ds.kernels.variant import Variant, build_variant
from torch import Tensor


class Tiling(NamedTuple):
    """How both kernels are compiled for one architecture and width."""

    num_warps: int
    """Of a program, which holds a row."""
    num_stages: int
    """Rows of a program that are worked on or on their way."""
    forward_programs: int
    """At most; their rows are worked on one after the other."""
    backward_programs: int
    """At most; each writes two sums of a row's width in float32, so there are no more than run at once."""


def choose_tiling(architecture: int, width: int) -> Tiling:
    """What compiles without spilled registers (budgets.json); its speed was never measured on a GPU.

    Args:
        architecture: 80, 90 or 100.
        width: D, at most 8192: then a thread holds 16 columns.
    """
    block = triton.next_power_of_2(width)
    num_warps = max(4, block // 512)
    resident = NUM_MULTIPROCESSORS[architecture] * 16 // num_warps  # backward takes up to 128 registers a thread
    return Tiling(num_warps, 2 if block > 4096 else 3, 4 * resident, resident)


def forward(
    x_TD: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    epsilon: float,
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """Launches the forward kernel.

    Args:
        x_TD: contiguous.
        stops: where each expert's rows end.
        weights: (D,) an expert.
        biases: (D,) an expert.
        epsilon: added to the variance.
        tiling: how to compile.

    Returns:
        h_TD; the mean of every row and 1 / its deviation, (2, T) float32.
    """
    h_TD = torch.empty_like(x_TD)
    statistics_2T = x_TD.new_empty(2, len(x_TD), dtype=torch.float32)
    programs = deal_rows(stops, tiling.forward_programs)
    if programs.num_programs:
        _check(x_TD)
        forward_kernel[(programs.num_programs,)](
            x_TD,
            *for_experts(weights),
            *for_experts(biases),
            h_TD,
            statistics_2T,
            programs.rows,
            *programs.stops,
            **_constants(x_TD.shape[1], tiling),
            EPSILON=epsilon,
            num_warps=tiling.num_warps,
        )
    return h_TD, statistics_2T


def backward(
    dh_TD: Tensor,
    d_residual_TD: Tensor | None,
    x_TD: Tensor,
    statistics_2T: Tensor,
    stops: Sequence[int],
    weights: Sequence[Tensor],
    tiling: Tiling,
) -> tuple[Tensor, Tensor]:
    """Launches the backward kernel and the sums over programs; no atomics, so the result is the same every time.

    Args:
        dh_TD: contiguous gradient of h.
        d_residual_TD: contiguous gradient of the stream that was passed through, added to dx; None for none.
        x_TD: as in `forward`, like the rest.

    Returns:
        dx_TD; the gradients of the scales and of the shifts, (2, E, D) of the scales' dtype.
    """
    dx_TD = torch.empty_like(x_TD)
    programs = deal_rows(stops, tiling.backward_programs)
    partial_2PD = x_TD.new_empty(2, programs.num_programs, x_TD.shape[1], dtype=torch.float32)
    if programs.num_programs:
        _check(dh_TD, x_TD if d_residual_TD is None else d_residual_TD, x_TD)
        backward_kernel[(programs.num_programs,)](
            dh_TD,
            d_residual_TD if d_residual_TD is not None else dh_TD,
            x_TD,
            statistics_2T,
            *for_experts(weights),
            dx_TD,
            partial_2PD,
            programs.rows,
            programs.num_programs,
            *programs.stops,
            **_constants(x_TD.shape[1], tiling),
            RESIDUAL=d_residual_TD is not None,
            num_warps=tiling.num_warps,
        )
    return dx_TD, sum_partials(partial_2PD, programs, len(stops), weights[0].dtype)


def variants(architecture: int) -> list[Variant]:
    """The kernels as `ahead_of_time` compiles them: widths of the stream and of the feed-forward's sub-LN."""
    cases = [("bf16", width) for width in (768, 1024, 1408, 3072, 4096, 6144)]
    cases += [("fp16", 1408), ("fp16", 6144), ("fp32", 768), ("fp32", 6144)]
    return [variant for case in cases for variant in _case_variants(architecture, *case)]


def _case_variants(architecture: int, element: str, width: int) -> list[Variant]:
    tiling, result = choose_tiling(architecture, width), []
    for kernel, own in ((forward_kernel, {"EPSILON": 1e-5}), (backward_kernel, {"RESIDUAL": True})):
        constants = {**_constants(width, tiling), **own}
        types = {name: f"*{element}" for name in kernel.arg_names if name.endswith("_ptr")}
        types |= {name: "*fp32" for name in ("statistics_ptr", "partial_ptr") if name in types}
        types |= {name: "i32" for name in kernel.arg_names if name not in types and name not in constants}
        result.append(
            build_variant(
                f"multiway_layer_norm {kernel.__name__.removesuffix('_kernel')} {element} D={width}",
                kernel,
                types,
                constants,
                num_warps=tiling.num_warps,
                num_stages=tiling.num_stages,
                is_common=(element, width) == ("bf16", 1408),
                is_memory_bound=True,
            )
        )
    return result


def _constants(width: int, tiling: Tiling) -> dict[str, int]:
    return {"D": width, "BLOCK": triton.next_power_of_2(width), "STAGES": tiling.num_stages}


def _check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.is_contiguous(), "multiway_layer_norm: the kernels' strides are those of (T, D)"
        assert x.numel() < 2**31, f"multiway_layer_norm: {tuple(x.shape)} has offsets beyond 32 bits"
