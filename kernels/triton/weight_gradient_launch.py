"""Launches the kernel of weight gradients, and lists the variants that are compiled ahead of time.

If a layer is small, each expert's rows are divided into ranges, called shares. Triton programs compute one weight
gradient per share, and `expert_rows.sum_kernel` adds the gradients.
"""

# T packed rows, OUT and IN widths of a layer, L layers, E experts, P shares of the rows.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton import multiway_ffn_launch as products
from beit3_ds.kernels.triton.architecture import NUM_MULTIPROCESSORS, architecture_of
from beit3_ds.kernels.triton.expert_rows_launch import RowPrograms, SumBlock, build_sum_variant, prepare_sum
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.sub_norm_launch import Slices, build_stops
from beit3_ds.kernels.triton.variant import KernelVariant
from beit3_ds.kernels.triton.weight_gradient import weight_gradient_kernel

NUM_LAYERS = 3
"""Number of layers that the kernel takes as arguments."""

SUM_BLOCK = SumBlock(512, 4)
"""Block size for adding up weight gradients. The rows of an expert are divided into few shares, and the gradients of
the shares are added. Each gradient has many columns: one per element of the weight and, if bias gradients are computed,
one per element of the bias."""

_MOST_SHARES = 16
_ROUNDING = 64
_PROGRAM_ROWS = 5
"""Modelled cost of one Triton program's partial sums. The unit is the time in which the program multiplies one row:
1/128 microsecond. The sums have 64 KB; writing and reading them at 3.35 TB/s takes 5 units."""


@Prepared
def weight_gradient(
    gradients: Sequence[Tensor], factor_T: Tensor | None, x_TI: Tensor, slices: Slices, with_bias: bool
) -> Callable[..., tuple[list[Tensor], list[Tensor]]]:
    """Prepares the computation of each expert's dW = (factor * dy)[rows].T @ x[rows], and db, the sum of (factor *
    dy)[rows].

    Results are deterministic for given numbers of rows, which determine the order of summation.

    Args:
        gradients: gradient of each layer's output, (T, OUT) each. The layers share their input; at most NUM_LAYERS
            layers.
        factor_T: factor of each row; None means 1.
        x_TI: input of the layers.
        slices: row range [start, stop) of each expert; an expert without rows gets zero gradients.
        with_bias: whether to compute db.

    Returns:
        Function that computes a list of dW and a list of db. A call of the decorated name (`Prepared`) prepares and
        computes in one step. The list of dW, (OUT, IN) each, has those of all experts of the first layer, then those of
        the second layer, and so on. The list of db, (OUT,) each, has the same order; it is empty if `with_bias` is
        false. All results are views of one tensor.
    """
    dy_TO, in_width, num_layers, num_experts = gradients[0], x_TI.shape[1], len(gradients), len(slices)
    out_width, dtype, architecture = dy_TO.shape[1], dy_TO.dtype, architecture_of(dy_TO.device)
    is_split, programs = _divide_into_shares(slices, out_width, in_width, num_layers, architecture, dtype)
    shares, area, numel = programs.num_programs, out_width * in_width, out_width * (in_width + with_bias)

    def grid(tiles: products.MatmulTiles) -> tuple[int, int, int]:
        row_tiles, column_tiles = ceil_div(out_width, tiles.rows), ceil_div(in_width, tiles.columns)
        return row_tiles * column_tiles, num_layers, shares

    constants = (out_width, in_width, num_layers, is_split, with_bias, factor_T is not None)
    launch = products.prepare_tiles(_WEIGHT_GRADIENT, grid, dy_TO, slices, constants, (programs.rows,))
    add_shares = prepare_sum(programs, num_layers, num_experts, numel, dtype, SUM_BLOCK) if is_split else None
    assert not is_split or num_layers * shares * numel < 2**31, "weight gradient: offsets beyond 32 bits"
    sum_dtype, copies = torch.float32 if is_split else dtype, [0] * (NUM_LAYERS - num_layers)
    starts = range(0, num_layers * num_experts * numel, numel)

    def run(
        gradients: Sequence[Tensor], factor_T: Tensor | None, x_TI: Tensor, slices: Any, with_bias: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        dy_TO = gradients[0]
        sums = dy_TO.new_empty(num_layers, shares, numel, dtype=sum_dtype)
        launch(*gradients, *[dy_TO for _ in copies], dy_TO if factor_T is None else factor_T, x_TI, sums)
        sums = sums if add_shares is None else add_shares(sums)
        d_weights = [sums.as_strided((out_width, in_width), (in_width, 1), start) for start in starts]
        return d_weights, [sums.as_strided((out_width,), (1,), start + area) for start in starts if with_bias]

    return run


def _divide_into_shares(
    slices: Slices,
    out_width: int,
    in_width: int,
    num_layers: int,
    architecture: int,
    dtype: torch.dtype,
) -> tuple[bool, RowPrograms]:
    """Returns whether each expert's rows are divided into shares, and the division into shares.

    If the rows are not divided, each expert's rows form one share.
    """
    first = products.choose_tiles(weight_gradient_kernel, architecture, dtype)[0]
    tiles = num_layers * ceil_div(out_width, first.rows) * ceil_div(in_width, first.columns)
    lengths, stops = [stop - start for start, stop in slices], build_stops(slices)
    if not splits_rows(tiles, architecture):
        return False, RowPrograms(1, stops, len(slices))
    rows = choose_share_rows(lengths, tiles, NUM_MULTIPROCESSORS[architecture])
    return True, RowPrograms(rows, stops, sum(ceil_div(length, rows) for length in lengths))


_WEIGHT_GRADIENT = KernelLauncher(weight_gradient_kernel)


def splits_rows(tiles: int, architecture: int) -> bool:
    """Returns whether each expert's rows must be divided into shares, so that there are enough Triton programs.

    The result does not depend on the number of rows, so that batches of different sizes use one compiled kernel.

    Args:
        tiles: total number of tiles of all layers' weights.
        architecture: GPU architecture: 80, 90 or 100.
    """
    return tiles < 4 * NUM_MULTIPROCESSORS[architecture]


def choose_share_rows(lengths: Sequence[int], tiles: int, multiprocessors: int) -> int:
    """Returns a maximum for the number of rows per share, chosen so that a launch takes the least modelled time.

    The rows of each expert are divided into shares. A Triton program computes one tile of a weight gradient from the
    rows of one share. The model of time assumes that programs run in waves, one program per multiprocessor. The time of
    a wave is proportional to the rows of a share. The partial sums take additional time, proportional to the number of
    programs.

    Args:
        lengths: number of rows of each expert.
        tiles: total number of tiles of all layers' weights.
        multiprocessors: number of multiprocessors of the GPU.
    """
    total = sum(lengths)

    def modelled(rows: int) -> int:
        programs = tiles * sum(-(-length // rows) for length in lengths)
        return -(-programs // multiprocessors) * rows + _PROGRAM_ROWS * programs

    candidates = {-(-total // shares) for shares in range(1, _MOST_SHARES + 1)}
    return min((max(1, -(-rows // _ROUNDING)) * _ROUNDING for rows in candidates), key=modelled)


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants that are compiled ahead of time, for the layers of the base, large and giant models.

    The giant model's FFN layers are compiled with every candidate for the tile sizes. All other layers are compiled
    only with the first candidate. This list is longer than that of the default tests, which compile only the giant
    model's FFN layers, with the first candidate, for sm_90.
    """
    result = []
    for element, hidden, ffn_hidden in products.SIZES:
        is_giant = hidden == 1408
        for out_width, in_width, num_layers, with_factor in (
            (ffn_hidden, hidden, 1, False),
            (hidden, ffn_hidden, 1, True),
            (hidden, hidden, 3, False),
        ):
            choices = products.candidate_tiles(weight_gradient_kernel, architecture, products.DTYPES[element])
            for tiles in choices if is_giant and num_layers == 1 else choices[:1]:
                column_tiles = ceil_div(in_width, choices[0].columns)
                is_split = splits_rows(num_layers * ceil_div(out_width, choices[0].rows) * column_tiles, architecture)
                flags = {"LAYERS": num_layers, "SPLIT": is_split, "BIAS": True, "FACTOR": with_factor}
                constants = {"OUT": out_width, "IN": in_width, **flags}
                is_common = is_giant and architecture == 90 and num_layers == 1 and tiles == choices[0]
                name = f"weight_gradient{' of 3 layers' if num_layers == 3 else ''} {element}"
                float32 = ("sum_ptr",) if is_split else ()
                kernel = weight_gradient_kernel
                result.append(products.build_tile_variant(name, kernel, element, constants, tiles, is_common, float32))
    return [*result, build_sum_variant("bf16", 1408 * 1409, SUM_BLOCK)]
