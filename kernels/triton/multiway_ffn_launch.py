"""Launches the kernels of multiway linear layers, chooses tile sizes, and lists variants to compile ahead of time."""

# T packed rows, D hidden, F ffn hidden (or any other two widths).

from __future__ import annotations  # else every preparation evaluates those of nested functions

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton.architecture import architecture_of
from beit3_ds.kernels.triton.budgets import spilling_variants
from beit3_ds.kernels.triton.expert_rows_launch import for_experts
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, Launch, TunedLaunch, row_class
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.multiway_ffn import (
    input_gradient_kernel,
    projection_kernel,
    up_projection_kernel,
)
from beit3_ds.kernels.triton.sub_norm_launch import Slices, build_stops, count_row_tiles
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant
from beit3_ds.kernels.triton.weight_gradient import weight_gradient_kernel


class MatmulTiles(NamedTuple):
    """Holds compile settings of a kernel that computes a matrix product. Each Triton program computes one tile."""

    rows: int
    """Rows of the result per tile."""
    columns: int
    """Columns of the result per tile."""
    depth: int
    """Elements of the summed dimension per loop step."""
    num_warps: int
    """Warps per Triton program."""
    num_stages: int
    """Number of loop steps whose memory loads overlap (software pipelining)."""

    def describe(self) -> str:
        """Returns the tile sizes and stages in the form of variant names, for example "128x64x64 x4"."""
        return f"{self.rows}x{self.columns}x{self.depth} x{self.num_stages}"


GROUP = 8
"""Number of row tiles whose Triton programs run together. These programs read the same columns of the weights from the
L2 cache."""


@lru_cache
def choose_tiles(kernel: Any, architecture: int, dtype: torch.dtype) -> list[MatmulTiles]:
    """Returns the tile sizes that a kernel may use, without those that spill registers.

    On a GPU, tuning selects the fastest. Elsewhere, the first is used. budgets.json records which tile sizes spill
    registers with the installed version of Triton.

    Args:
        kernel: kernel of multiway_ffn.py, multiway_qkv.py or weight_gradient.py.
        architecture: GPU architecture: 80, 90 or 100 (`architecture_of`).
        dtype: dtype of the operands. float32 is multiplied exactly, not on tensor cores.
    """
    operators = ("linear", "out_projection") if kernel is projection_kernel else (kernel.__name__[: -len("_kernel")],)
    names = rf"multiway_ffn ({'|'.join(operators)})\b[\w ]* {_ELEMENTS[dtype]}( fp32 stream)? \d+->\d+ tile "
    spilling = [name for name in spilling_variants(triton.__version__, architecture) if re.match(names, name)]
    candidates = candidate_tiles(kernel, architecture, dtype)
    return [tiles for tiles in candidates if not any(name.endswith(f" {tiles.describe()}") for name in spilling)]


def candidate_tiles(kernel: Any, architecture: int, dtype: torch.dtype) -> list[MatmulTiles]:
    """Returns the tile sizes with which a kernel is compiled ahead of time; takes the arguments of `choose_tiles`."""
    if dtype == torch.float32:
        num_warps = 8 if kernel is weight_gradient_kernel and architecture == 80 else 4  # with 4, registers would spill
        return [MatmulTiles(64, 64, 32, num_warps, 2)]
    if kernel is up_projection_kernel:
        return [MatmulTiles(128, 128, 64, 8, 3), MatmulTiles(128, 128, 64, 8, 2), MatmulTiles(64, 128, 64, 8, 3)]
    if kernel is weight_gradient_kernel and architecture == 80:
        return [MatmulTiles(128, 128, 32, 8, 4), MatmulTiles(128, 64, 32, 4, 4), MatmulTiles(64, 64, 64, 4, 3)]
    return [
        MatmulTiles(128, 128, 64, 8, 3),
        MatmulTiles(128, 128, 64, 8, 4),
        MatmulTiles(128, 64, 64, 8, 4),
        MatmulTiles(64, 128, 64, 4, 3),
    ]


@Prepared
def linear(x_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Callable[..., Tensor]:
    """Prepares the computation of each expert's linear layer on its own rows: y_TF = x_TD @ w_FD.T + b_F.

    Args:
        x_TD: rows in bfloat16, float16 or float32. All tensors have this dtype and are contiguous.
        slices: row range [start, stop) of each expert.
        weights: one matrix (F, D) per expert, for output width F and input width D.
        biases: one vector (F,) per expert; empty for no biases.

    Returns:
        Function that computes y_TF. A call of the decorated name (`Prepared`) prepares and computes in one step.
    """
    return out_projection.prepare(x_TD, slices, weights, biases, None, None)


@Prepared
def out_projection(
    a_TF: Tensor,
    slices: Slices,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    residual_TD: Tensor | None,
    factor_T: Tensor | None,
) -> Callable[..., Tensor]:
    """Prepares the computation of y_TD = residual + factor * (a @ w_DF.T + b) with each row's expert. All tensors are
    contiguous.

    Args:
        a_TF: input rows.
        slices: row range [start, stop) of each expert.
        weights: one matrix (D, F) per expert, for output width D and input width F.
        biases: one vector (D,) per expert; empty for no biases.
        residual_TD: residual stream to add, or None. The output has the dtype of the stream, or that of `a_TF` if the
            stream is None.
        factor_T: drop-path factor of each row in any floating dtype; None means 1.

    Returns:
        Function that computes y_TD. A call of the decorated name (`Prepared`) prepares and computes in one step.
    """
    (out_width, in_width), flags = weights[0].shape, (bool(biases), residual_TD is not None, factor_T is not None)
    launch = _prepare_rows(_PROJECTION, a_TF, slices, out_width, (out_width, in_width, *flags))
    num_rows = len(a_TF)

    def run(
        a_TF: Tensor,
        slices: Any,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor],
        residual_TD: Tensor | None = None,
        factor_T: Tensor | None = None,
    ) -> Tensor:
        stream_TD = a_TF if residual_TD is None else residual_TD  # not read if None, like the factors
        factors = a_TF if factor_T is None else factor_T
        y_TD = stream_TD.new_empty(num_rows, out_width)
        launch(a_TF, *for_experts(weights), *for_experts(biases or (a_TF,)), stream_TD, factors, y_TD)
        return y_TD

    return run


@Prepared
def up_projection(
    h_TD: Tensor, slices: Slices, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Prepares the computation of u_TF = h @ w.T + b with each row's expert, and a_TF = gelu(u_TF) with the exact (erf)
    GELU.

    Args:
        h_TD: input rows, contiguous.
        slices: row range [start, stop) of each expert.
        weights: one matrix (F, D) per expert, for output width F and input width D.
        biases: one vector (F,) per expert; empty for no biases.

    Returns:
        Function that computes u_TF and a_TF. A call of the decorated name (`Prepared`) prepares and computes in one
        step.
    """
    (num_rows, width), out_width = h_TD.shape, weights[0].shape[0]
    launch = _prepare_rows(_UP_PROJECTION, h_TD, slices, out_width, (out_width, width, bool(biases)))

    def run(h_TD: Tensor, slices: Any, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        u_TF = h_TD.new_empty(num_rows, out_width)
        a_TF = torch.empty_like(u_TF)
        launch(h_TD, *for_experts(weights), *for_experts(biases or (h_TD,)), u_TF, a_TF)
        return u_TF, a_TF

    return run


@Prepared
def input_gradient(
    dy_TD: Tensor, factor_T: Tensor | None, slices: Slices, weights: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """Prepares the computation of the gradient of a linear layer's input: dx_TF = factor * dy_TD @ w_DF.

    Args:
        dy_TD: gradient of the layer's output, contiguous.
        factor_T: factor of each row; None means 1.
        slices: row range [start, stop) of each expert.
        weights: one matrix (D, F) per expert, for output width D and input width F.

    Returns:
        Function that computes dx_TF. A call of the decorated name (`Prepared`) prepares and computes in one step.
    """
    num_rows, (out_width, in_width) = len(dy_TD), weights[0].shape
    launch = _prepare_rows(_INPUT_GRADIENT, dy_TD, slices, in_width, (in_width, out_width, factor_T is not None))

    def run(dy_TD: Tensor, factor_T: Tensor | None, slices: Any, weights: Sequence[Tensor]) -> Tensor:
        dx_TF = dy_TD.new_empty(num_rows, in_width)
        launch(dy_TD, dy_TD if factor_T is None else factor_T, *for_experts(weights), dx_TF)
        return dx_TF

    return run


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants that are compiled ahead of time, for the widths of the base, large and giant models.

    The giant model's FFN kernels are compiled with every candidate for the tile sizes. There is one exception: its
    output projection with a float32 residual stream. This projection and all other kernels are compiled only with the
    first candidate.

    The default tests compile two of these variants, with the first candidate: the giant model's up projection for all
    architectures, and the giant model's output projection for sm_90.
    """
    result = []
    for element, hidden, ffn_hidden in SIZES:
        is_giant = hidden == 1408
        for name, kernel, constants in _build_cases(hidden, ffn_hidden):
            choices = candidate_tiles(kernel, architecture, DTYPES[element])
            is_common = is_giant and (architecture == 90 or kernel is up_projection_kernel) and name in _COMMON
            for tiles in choices if is_giant and name != "linear" else choices[:1]:
                common = is_common and tiles == choices[0]
                result.append(build_tile_variant(f"{name} {element}", kernel, element, constants, tiles, common))
                if name == "out_projection" and element == "bf16" and tiles == choices[0]:
                    label = f"{name} {element} fp32 stream"
                    result.append(build_tile_variant(label, kernel, element, constants, tiles, False, _FLOAT32_STREAM))
    return result


SIZES = (
    ("bf16", 768, 3072),
    ("bf16", 1024, 4096),
    ("bf16", 1408, 6144),
    ("fp16", 1024, 4096),
    ("fp32", 768, 3072),
)
"""Element type, hidden size and FFN hidden size of the variants that are compiled ahead of time, for the base, large
and giant models."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""PyTorch's dtype for each element type."""
_ELEMENTS = {dtype: element for element, dtype in DTYPES.items()}
_COMMON = ("up_projection", "out_projection")
_FLOAT32_STREAM = ("residual_ptr", "factor_ptr", "y_ptr")
"""Arguments of `projection_kernel` that are float32 if the residual stream is float32."""


def _build_cases(hidden: int, ffn_hidden: int) -> list[tuple[str, Any, dict[str, int]]]:
    """Returns (name, kernel, constexpr arguments) for four matrix products of a block.

    The products are an attention projection without residual, the FFN's two projections, and the input gradient of the
    FFN's second projection.
    """
    plain = {"RESIDUAL": False, "FACTOR": False}
    whole = dict.fromkeys(("BIAS", "RESIDUAL", "FACTOR"), True)
    return [
        ("linear", projection_kernel, {"N": hidden, "K": hidden, "BIAS": True, **plain}),
        ("up_projection", up_projection_kernel, {"N": ffn_hidden, "K": hidden, "BIAS": True}),
        ("out_projection", projection_kernel, {"N": hidden, "K": ffn_hidden, **whole}),
        ("input_gradient", input_gradient_kernel, {"N": ffn_hidden, "K": hidden, "FACTOR": True}),
    ]


def build_tile_variant(
    name: str,
    kernel: Any,
    element: str,
    constants: dict[str, int],
    tiles: MatmulTiles,
    is_common: bool,
    float32: Sequence[str] = (),
) -> KernelVariant:
    """Builds a variant of a matrix-product kernel, for one dtype, one weight shape and one choice of tile sizes.

    Args:
        name: name of the product and dtype, at the start of the variant's name.
        kernel: function decorated with `triton.jit`.
        element: element type of all pointers that are not in `float32`: "bf16", "fp16" or "fp32".
        constants: constexpr arguments except the tile sizes. They include the two widths of the weight ("N" and "K", or
            "OUT" and "IN").
        tiles: tile sizes.
        is_common: see `KernelVariant`.
        float32: names of pointers with float32 elements.
    """
    values = {**constants, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth, "GROUP": GROUP}
    types = {argument: f"*{element}" for argument in kernel.arg_names if argument.endswith("_ptr")}
    types |= {argument: "*fp32" for argument in types if argument in float32}
    types |= {argument: "i32" for argument in kernel.arg_names if argument in ("stop_0", "stop_1", "stop_2", "rows")}
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


def prepare_tiles(
    launcher: KernelLauncher,
    grid: Callable[[MatmulTiles], tuple[int, ...]],
    x: Tensor,
    slices: Slices,
    constants: tuple[int, ...],
    numbers: tuple[int, ...] = (),
) -> TunedLaunch:
    """Prepares the launch of a kernel that computes a matrix product, with the fastest of the kernel's tile sizes.

    Args:
        launcher: launcher of the kernel.
        grid: function that returns the number of Triton programs along each axis, for given tile sizes.
        x: first argument of the kernel, whose device and dtype determine the candidate tile sizes.
        slices: row range [start, stop) of each expert. The kernel takes the stop rows as integers, after its tensor
            arguments. If no expert has rows, the kernel is not launched.
        constants: constexpr arguments before the tile sizes.
        numbers: integer arguments between the stop rows and the constants.
    """
    num_rows = slices[-1][1] if slices else 0

    def prepare(tiles: MatmulTiles) -> Launch:
        rows, columns, depth, num_warps, num_stages = tiles
        values, integers = (*constants, rows, columns, depth, GROUP), (*build_stops(slices), *numbers)
        return launcher.prepare(grid(tiles), integers, values, num_warps=num_warps, num_stages=num_stages)

    case = launcher.name, row_class(num_rows), x.dtype, *constants
    settings = partial(choose_tiles, launcher.kernel, architecture_of(x.device), x.dtype)
    return TunedLaunch(case, settings, prepare, is_empty=num_rows == 0)


def _prepare_rows(
    launcher: KernelLauncher, x: Tensor, slices: Slices, out_width: int, constants: tuple[int, ...]
) -> TunedLaunch:
    """Prepares a kernel whose result has one row for each of the packed rows, and `out_width` columns."""

    def grid(tiles: MatmulTiles) -> tuple[int]:
        return (count_row_tiles(slices, tiles.rows) * ceil_div(out_width, tiles.columns),)

    return prepare_tiles(launcher, grid, x, slices, constants)
