"""Launches the kernels for queries, keys and values, and lists the variants that are compiled ahead of time."""

# T packed rows, D input width, F output width of each of the three layers.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton import multiway_ffn_launch as products
from beit3_ds.kernels.triton.expert_rows_launch import for_experts
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, TunedLaunch
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.multiway_qkv import qkv_input_gradient_kernel, qkv_kernel
from beit3_ds.kernels.triton.sub_norm_launch import Slices, count_row_tiles
from beit3_ds.kernels.triton.variant import KernelVariant

NUM_LAYERS = 3
"""Number of linear layers: queries, keys and values, in this order."""


@Prepared
def qkv(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Prepares the computation of q_TF, k_TF and v_TF: each expert's three linear layers, applied to the expert's rows.

    Args:
        x_TD: rows in bfloat16, float16 or float32. All tensors have this dtype and are contiguous.
        slices: row range [start, stop) of each expert.
        weights: matrices (F, D): one per expert for queries, then one per expert for keys, then for values.
        biases: vectors (F,), in the order of `weights`.

    Returns:
        Function that computes q_TF, k_TF and v_TF. A call of the decorated name (`Prepared`) prepares and computes in
        one step.
    """
    num_rows, (out_width, in_width) = len(x_TD), weights[0].shape
    launch = _prepare(_QKV, x_TD, slices, out_width, in_width, NUM_LAYERS)

    def run(
        x_TD: Tensor, slices: Any, weights: Sequence[Tensor], biases: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        q_TF = x_TD.new_empty(num_rows, out_width)
        k_TF, v_TF = torch.empty_like(q_TF), torch.empty_like(q_TF)
        launch(x_TD, *_for_layers(weights), *_for_layers(biases), q_TF, k_TF, v_TF)
        return q_TF, k_TF, v_TF

    return run


@Prepared
def qkv_input_gradient(
    dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, slices: Slices, weights: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Prepares the computation of the gradient of the three layers' common input: dx_TD = dq @ w_q + dk @ w_k + dv @
    w_v.

    Args:
        dq_TF: gradient of the queries, contiguous.
        dk_TF: gradient of the keys, contiguous.
        dv_TF: gradient of the values, contiguous.
        slices: row range [start, stop) of each expert.
        weights: matrices (F, D), in the same order as for `qkv`.

    Returns:
        Function that computes dx_TD. A call of the decorated name (`Prepared`) prepares and computes in one step.
    """
    num_rows, (out_width, in_width) = len(dq_TF), weights[0].shape
    launch = _prepare(_INPUT_GRADIENT, dq_TF, slices, in_width, out_width, 1)

    def run(dq_TF: Tensor, dk_TF: Tensor, dv_TF: Tensor, slices: Any, weights: Sequence[Tensor]) -> Tensor:
        dx_TD = dq_TF.new_empty(num_rows, in_width)
        launch(dq_TF, dk_TF, dv_TF, *_for_layers(weights), dx_TD)
        return dx_TD

    return run


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants that are compiled ahead of time.

    The giant model's layers are compiled with every candidate for the tile sizes. All other layers are compiled only
    with the first candidate.
    """
    return [
        products.build_tile_variant(
            f"{kernel.__name__.removesuffix('_kernel')} {element}",
            kernel,
            element,
            {"N": hidden, "K": hidden},
            tiles,
            is_common=hidden == 1408 and architecture == 90 and tiles == choices[0],
        )
        for kernel in (qkv_kernel, qkv_input_gradient_kernel)
        for element, hidden, _ in products.SIZES
        for choices in [products.candidate_tiles(kernel, architecture, products.DTYPES[element])]
        for tiles in (choices if hidden == 1408 else choices[:1])
    ]


def _for_layers(parameters: Sequence[Tensor]) -> Sequence[Tensor]:
    """Extends the parameters of the query, key and value layers to NUM_EXPERTS parameters per layer.

    Each layer has one parameter per expert. With fewer than NUM_EXPERTS experts, the last parameter of each layer is
    repeated.
    """
    num_experts = len(parameters) // NUM_LAYERS
    layers = [parameters[start : start + num_experts] for start in range(0, len(parameters), num_experts)]
    return [parameter for layer in layers for parameter in for_experts(layer)]


def _prepare(
    launcher: KernelLauncher, x: Tensor, slices: Slices, out_width: int, in_width: int, num_layers: int
) -> TunedLaunch:
    def grid(tiles: products.MatmulTiles) -> tuple[int]:
        return (count_row_tiles(slices, tiles.rows) * num_layers * ceil_div(out_width, tiles.columns),)

    return products.prepare_tiles(launcher, grid, x, slices, (out_width, in_width))


_QKV = KernelLauncher(qkv_kernel)
_INPUT_GRADIENT = KernelLauncher(qkv_input_gradient_kernel)
