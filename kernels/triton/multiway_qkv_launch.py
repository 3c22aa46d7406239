"""Launches the kernels for queries, keys and values, and lists the variants that are compiled ahead of time."""

# T packed rows, D input width, F output width of each of the three layers.

from collections.abc import Sequence

from torch import Tensor

from beit3_ds.kernels.triton import multiway_ffn_launch as products
from beit3_ds.kernels.triton.expert_rows_launch import for_experts
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.multiway_qkv import qkv_input_gradient_kernel, qkv_kernel
from beit3_ds.kernels.triton.sub_norm_launch import Slices, count_row_tiles
from beit3_ds.kernels.triton.variant import KernelVariant

NUM_LAYERS = 3
"""Number of linear layers: queries, keys and values, in this order."""


def qkv(
    x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Applies each expert's three linear layers to the expert's rows; returns q_TF, k_TF and v_TF.

    Args:
        x_TD: rows in bfloat16, float16 or float32. All tensors have this dtype and are contiguous.
        slices: row range [start, stop) of each expert.
        weights: matrices (F, D): one per expert for queries, then one per expert for keys, then for values.
        biases: vectors (F,), in the order of `weights`.
    """
    out_width, in_width = weights[0].shape
    outputs = [x_TD.new_empty(x_TD.shape[0], out_width) for _ in range(NUM_LAYERS)]
    tensors = (x_TD, *_for_layers(weights), *_for_layers(biases), *outputs)
    _launch(_QKV, tensors, slices, out_width, in_width, NUM_LAYERS)
    q_TF, k_TF, v_TF = outputs
    return q_TF, k_TF, v_TF


def qkv_input_gradient(gradients: Sequence[Tensor], slices: Slices, weights: Sequence[Tensor]) -> Tensor:
    """Computes the gradient of the three layers' common input: dx_TD = dq @ w_q + dk @ w_k + dv @ w_v.

    Args:
        gradients: dq, dk and dv, (T, F) each, contiguous.
        slices: row range [start, stop) of each expert.
        weights: matrices (F, D), in the same order as for `qkv`.
    """
    out_width, in_width = weights[0].shape
    dx_TD = gradients[0].new_empty(gradients[0].shape[0], in_width)
    tensors = (*gradients, *_for_layers(weights), dx_TD)
    _launch(_INPUT_GRADIENT, tensors, slices, in_width, out_width, 1)
    return dx_TD


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants that are compiled ahead of time.

    The giant model's layers are compiled with all tile sizes, and other layers with the first tile sizes.
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


def _for_layers(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Extends the parameters of each of the three layers to NUM_EXPERTS, by repeating the layer's last parameter."""
    num_experts = len(parameters) // NUM_LAYERS
    layers = [parameters[start : start + num_experts] for start in range(0, len(parameters), num_experts)]
    return [parameter for layer in layers for parameter in for_experts(layer)]


def _launch(
    launcher: KernelLauncher,
    tensors: tuple[Tensor, ...],
    slices: Slices,
    out_width: int,
    in_width: int,
    num_layers: int,
) -> None:
    if not slices or slices[-1][1] == 0:
        return

    def grid(tiles: products.MatmulTiles) -> tuple[int]:
        return (count_row_tiles(slices, tiles.rows) * num_layers * ceil_div(out_width, tiles.columns),)

    products.launch_tiles(launcher, grid, tensors, slices, (out_width, in_width))


_QKV = KernelLauncher(qkv_kernel)
_INPUT_GRADIENT = KernelLauncher(qkv_input_gradient_kernel)
