"""Launches the multiway FFN's kernels, chooses their tile sizes, and lists variants for ahead-of-time compilation."""

# T packed rows, D hidden, F ffn hidden (or any other two widths).

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from beit3_ds.kernels.triton.architecture import architecture_of, is_on_gpu
from beit3_ds.kernels.triton.budgets import spilling_variants
from beit3_ds.kernels.triton.expert_rows_launch import for_experts
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, Tuner, row_class
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.multiway_ffn import (
    input_gradient_kernel,
    projection_kernel,
    up_projection_kernel,
    weight_gradient_kernel,
)
from beit3_ds.kernels.triton.sub_norm_launch import (
    Norm,
    Slices,
    build_stops,
    combine_statistics,
    count_row_tiles,
)
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant


class MatmulTiles(NamedTuple):
    """Sets how a kernel with a matrix product is compiled; each program computes one tile of the product."""

    rows: int
    """Rows of a tile."""
    columns: int
    """Columns of a tile."""
    depth: int
    """Number of terms that one loop step adds to every sum of the product."""
    num_warps: int
    """Warps per program."""
    num_stages: int
    """Number of loop steps whose loads from memory overlap (software pipelining)."""

    def describe(self) -> str:
        """Returns the sizes as the names of variants have them, e.g. "128x64x64 x4"."""
        return f"{self.rows}x{self.columns}x{self.depth} x{self.num_stages}"


GROUP = 8
"""Number of row tiles whose programs run together, so that they share columns of the weights in the L2 cache."""


@lru_cache
def choose_tiles(kernel: Any, architecture: int, dtype: torch.dtype) -> list[MatmulTiles]:
    """Returns the tile sizes that a kernel may use. On a GPU, tuning selects the fastest; elsewhere the first is used.

    They are the candidates that spill no registers under the installed version of Triton, as budgets.json records.

    Args:
        kernel: a kernel of multiway_ffn.py.
        architecture: GPU architecture, 80, 90 or 100 (`architecture_of`).
        dtype: dtype of the operands. float32 is multiplied exactly, not on tensor cores.
    """
    operators = ("linear", "out_projection") if kernel is projection_kernel else (kernel.__name__[: -len("_kernel")],)
    names = rf"multiway_ffn ({'|'.join(operators)})\b[\w ]* {_ELEMENTS[dtype]}( fp32 stream)? \d+->\d+ tile "
    spilling = [name for name in spilling_variants(triton.__version__, architecture) if re.match(names, name)]
    candidates = candidate_tiles(kernel, architecture, dtype)
    return [tiles for tiles in candidates if not any(name.endswith(f" {tiles.describe()}") for name in spilling)]


def candidate_tiles(kernel: Any, architecture: int, dtype: torch.dtype) -> list[MatmulTiles]:
    """Returns the tile sizes that are compiled ahead of time; the arguments are those of `choose_tiles`."""
    if dtype == torch.float32:
        return [MatmulTiles(64, 64, 32, 4, 2)]
    if kernel is up_projection_kernel:  # its statistics have one slot per column tile, so all tiles are 128 wide
        return [MatmulTiles(128, 128, 64, 8, 3), MatmulTiles(128, 128, 64, 8, 2), MatmulTiles(64, 128, 64, 8, 3)]
    if kernel is weight_gradient_kernel and architecture == 80:
        return [MatmulTiles(128, 128, 32, 8, 4), MatmulTiles(128, 64, 32, 4, 4), MatmulTiles(64, 64, 64, 4, 3)]
    return [
        MatmulTiles(128, 128, 64, 8, 3),
        MatmulTiles(128, 128, 64, 8, 4),
        MatmulTiles(128, 64, 64, 8, 4),
        MatmulTiles(64, 128, 64, 4, 3),
    ]


def linear(x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """Applies each expert's linear layer to its own rows: y_TF = x_TD @ w_FD.T + b_F.

    Args:
        x_TD: rows; rows, weights and biases are bfloat16, float16 or float32. All tensors of this file are contiguous.
        slices: row range of each expert.
        weights: one matrix per expert, (F, D) for output width F and input width D.
        biases: one vector (F,) per expert; empty for none.
    """
    return out_projection(x_TD, None, slices, weights, biases, None, None)


def out_projection(
    a_TF: Tensor,
    norm: Norm | None,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual_TD: Tensor | None,
    factor_T: Tensor | None,
) -> Tensor:
    """Computes y_TD = residual + factor * (LN(a) @ w_DF.T + b), with the norm inside the product's kernel.

    Args:
        a_TF: rows.
        norm: the sub-LN, or None.
        slices: row range of each expert.
        weights: one matrix per expert, (D, F) for output width D and input width F.
        biases: one vector (D,) per expert; empty for none.
        residual_TD: stream to add, which gives y its dtype, or None.
        factor_T: drop-path factor of each row, of any floating dtype, or None.
    """
    y_TD = (a_TF if residual_TD is None else residual_TD).new_empty(a_TF.shape[0], weights[0].shape[0])
    mean_T, rstd_T, scales, shifts = norm or (a_TF, a_TF, (a_TF,), (a_TF,))
    tensors = (
        a_TF,
        *for_experts(weights),
        *for_experts(biases or (a_TF,)),
        mean_T,
        rstd_T,
        *for_experts(scales),
        *for_experts(shifts),
        a_TF if residual_TD is None else residual_TD,
        a_TF if factor_T is None else factor_T,
        y_TD,
    )
    (out_width, in_width), flags = weights[0].shape, (bool(biases), norm is not None)
    constants = (out_width, in_width, *flags, residual_TD is not None, factor_T is not None)
    _launch_rows(_PROJECTION, tensors, slices, out_width, constants)
    return y_TD


def up_projection(
    h_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor], with_statistics: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes each expert's first linear layer, the exact GELU and the statistics of the sub-LN that follows.

    Args:
        h_TD: rows.
        slices: row range of each expert.
        weights: one matrix per expert, (F, D) for output width F and input width D.
        biases: one vector (F,) per expert; empty for none.
        with_statistics: whether a sub-LN follows.

    Returns:
        u_TF = h @ w.T + b, a_TF = gelu(u_TF), and mean_T and squares_T of a's rows, float32; squares_T is the sum of
        squared deviations from the mean. The last two are empty without statistics.
    """
    (num_rows, width), out_width = h_TD.shape, weights[0].shape[0]
    u_TF = h_TD.new_empty(num_rows, out_width)
    a_TF = torch.empty_like(u_TF)
    tiles = choose_tiles(up_projection_kernel, architecture_of(h_TD.device), h_TD.dtype)
    column_tiles = ceil_div(out_width, tiles[0].columns) if with_statistics else 0
    # Two tensors, because Triton would compile another variant for the address of a second half.
    means, squares = (h_TD.new_empty(column_tiles, num_rows, dtype=torch.float32) for _ in range(2))
    tensors = (h_TD, *for_experts(weights), *for_experts(biases or (h_TD,)), u_TF, a_TF, means, squares)
    constants = (out_width, width, bool(biases), with_statistics)
    _launch_rows(_UP_PROJECTION, tensors, slices, out_width, constants)
    if not with_statistics:
        return u_TF, a_TF, means.view(-1), squares.view(-1)
    return u_TF, a_TF, *combine_statistics(means, squares, out_width, tiles[0].columns)


def input_gradient(dy_TD: Tensor, factor_T: Tensor | None, slices: Slices, weights: Sequence[Tensor]) -> Tensor:
    """Computes dx_TF = factor * dy_TD @ w_DF, the gradient of a linear layer's input.

    Args:
        dy_TD: gradient of the layer's output.
        factor_T: factor of each row, or None.
        slices: row range of each expert.
        weights: one matrix per expert, (D, F) for output width D and input width F.
    """
    dx_TF = dy_TD.new_empty(dy_TD.shape[0], weights[0].shape[1])
    tensors = (dy_TD, dy_TD if factor_T is None else factor_T, *for_experts(weights), dx_TF)
    out_width, in_width = weights[0].shape
    _launch_rows(_INPUT_GRADIENT, tensors, slices, in_width, (in_width, out_width, factor_T is not None))
    return dx_TF


def weight_gradient(
    dy_TD: Tensor, factor_T: Tensor | None, x_TF: Tensor, slices: Slices, with_bias: bool
) -> tuple[list[Tensor], list[Tensor]]:
    """Computes each expert's dw_DF = (factor * dy)[rows].T @ x[rows] and db_D, the sum of (factor * dy)[rows].

    The results are deterministic.

    Args:
        dy_TD: gradient of a linear layer's output.
        factor_T: factor of each row, or None.
        x_TF: the layer's input.
        slices: row range of each expert; one without rows gets zeros.
        with_bias: whether to return db.

    Returns:
        dw and db of each expert; without `with_bias` db is an empty list.
    """
    out_width, in_width = dy_TD.shape[1], x_TF.shape[1]
    d_weights = [dy_TD.new_empty(out_width, in_width) for _ in slices]
    d_biases = [dy_TD.new_empty(out_width) for _ in slices] if with_bias else []
    parameters = (*for_experts(d_weights), *for_experts(d_biases or (dy_TD,)))
    tensors = (dy_TD, dy_TD if factor_T is None else factor_T, x_TF, *parameters)

    def count_programs(tiles: MatmulTiles) -> int:
        return len(slices) * ceil_div(out_width, tiles.rows) * ceil_div(in_width, tiles.columns)

    constants = (out_width, in_width, with_bias, factor_T is not None)
    _launch(_WEIGHT_GRADIENT, count_programs, tensors, slices, constants)
    return d_weights, d_biases


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants for ahead-of-time compilation, for the shapes of the models base, large and giant.

    Giant's FFN kernels are compiled with all tile sizes, all others with the first tile sizes only. The default tests
    compile only some variants of giant, with the first tile sizes: the up projection for all architectures, the output
    projection and the weight gradient for sm_90.
    """
    result = []
    for element, hidden, ffn_hidden in (
        ("bf16", 768, 3072),
        ("bf16", 1024, 4096),
        ("bf16", 1408, 6144),
        ("fp16", 1024, 4096),
        ("fp32", 768, 3072),
    ):
        is_giant = hidden == 1408
        for name, kernel, constants in _build_cases(hidden, ffn_hidden):
            choices = candidate_tiles(kernel, architecture, _DTYPES[element])
            is_common = is_giant and (kernel is up_projection_kernel or (architecture == 90 and name in _COMMON))
            for tiles in choices if is_giant and name != "linear" else choices[:1]:
                common = is_common and tiles == choices[0]
                result.append(_build_variant(f"{name} {element}", kernel, element, constants, tiles, common))
                if name == "out_projection" and element == "bf16" and tiles == choices[0]:
                    label = f"{name} {element} fp32 stream"
                    result.append(_build_variant(label, kernel, element, constants, tiles, False, _FLOAT32_STREAM))
    return result


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ELEMENTS = {dtype: element for element, dtype in _DTYPES.items()}
_COMMON = ("out_projection", "weight_gradient")
_FLOAT32_STREAM = ("residual_ptr", "factor_ptr", "y_ptr")
"""Arguments of `projection_kernel` that are float32 if the residual stream is float32."""
_STATISTICS = ("mean_ptr", "rstd_ptr", "means_ptr", "squares_ptr")


def _build_cases(hidden: int, ffn_hidden: int) -> list[tuple[str, Any, dict[str, int]]]:
    """Returns (name, kernel, constexpr arguments) of one block's kernels.

    They are attention's projection, the FFN's two projections, and the gradients of their inputs and weights.
    """
    plain = {"NORM": False, "RESIDUAL": False, "FACTOR": False}
    whole = dict.fromkeys(("BIAS", "NORM", "RESIDUAL", "FACTOR"), True)
    return [
        ("linear", projection_kernel, {"N": hidden, "K": hidden, "BIAS": True, **plain}),
        ("up_projection", up_projection_kernel, {"N": ffn_hidden, "K": hidden, "BIAS": True, "STATISTICS": True}),
        ("out_projection", projection_kernel, {"N": hidden, "K": ffn_hidden, **whole}),
        ("input_gradient", input_gradient_kernel, {"N": ffn_hidden, "K": hidden, "FACTOR": True}),
        ("weight_gradient", weight_gradient_kernel, {"OUT": ffn_hidden, "IN": hidden, "BIAS": True, "FACTOR": False}),
        ("weight_gradient", weight_gradient_kernel, {"OUT": hidden, "IN": ffn_hidden, "BIAS": True, "FACTOR": True}),
    ]


def _build_variant(
    name: str,
    kernel: Any,
    element: str,
    constants: dict[str, int],
    tiles: MatmulTiles,
    is_common: bool,
    float32: Sequence[str] = (),
) -> KernelVariant:
    values = {**constants, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": GROUP}
    types = {argument: f"*{element}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    types |= {argument: "*fp32" for argument in types if argument in (*_STATISTICS, *float32)}
    types |= dict.fromkeys(("stop_0", "stop_1", "stop_2"), "i32")
    out_width, in_width = (value for key, value in constants.items() if key in ("N", "K", "OUT", "IN"))
    return build_variant(
        f"multiway_ffn {name} {in_width}->{out_width} tile {tiles.describe()}",
        kernel,
        types,
        values,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        is_common=is_common,
    )


_PROJECTION = KernelLauncher(projection_kernel)
_UP_PROJECTION = KernelLauncher(up_projection_kernel)
_INPUT_GRADIENT = KernelLauncher(input_gradient_kernel)
_WEIGHT_GRADIENT = KernelLauncher(weight_gradient_kernel)
_TUNER = Tuner()


def _launch_rows(
    launcher: KernelLauncher, tensors: tuple[Tensor, ...], slices: Slices, out_width: int, constants: tuple[int, ...]
) -> None:
    """Launches a kernel over tiles of the packed rows; the result has `out_width` columns."""
    if not slices or slices[-1][1] == 0:
        return

    def count_programs(tiles: MatmulTiles) -> int:
        return count_row_tiles(slices, tiles.rows) * ceil_div(out_width, tiles.columns)

    _launch(launcher, count_programs, tensors, slices, constants)


def _launch(
    launcher: KernelLauncher,
    count_programs: Callable[[MatmulTiles], int],
    tensors: tuple[Tensor, ...],
    slices: Slices,
    constants: tuple[int, ...],
) -> None:
    """Launches a kernel with its fastest tile sizes; `constants` are its constexpr arguments before the tile sizes."""
    assert all(map(Tensor.is_contiguous, tensors)), "multiway FFN: the kernels' strides are those of contiguous rows"
    x, stops = tensors[0], build_stops(slices)

    def launch(tiles: MatmulTiles) -> None:
        rows, columns, depth, num_warps, num_stages = tiles
        values = (*constants, rows, columns, depth, GROUP)
        grid = (count_programs(tiles),)
        launcher.launch(grid, tensors, stops, values, num_warps=num_warps, num_stages=num_stages)

    def settings() -> list[MatmulTiles]:
        return choose_tiles(launcher.kernel, architecture_of(x.device), x.dtype)

    if is_on_gpu(x):
        case = launcher.name, row_class(stops[-1]), x.dtype, *constants
        launch(_TUNER.choose(case, settings, launch))
    else:
        launch(settings()[0])
