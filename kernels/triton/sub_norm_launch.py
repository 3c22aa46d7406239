"""Launches the kernels of the sub-LN, and lists the variants that are compiled ahead of time."""

# T packed rows, F columns of this rank (tensor-parallel ranks may divide a row).

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from beit3_ds.kernels.triton.expert_rows_launch import for_experts
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher
from beit3_ds.kernels.triton.launch_sizes import ceil_div, next_power_of_2
from beit3_ds.kernels.triton.sub_norm import (
    norm_gradient_kernel,
    norm_gradient_sums_kernel,
    normalize_kernel,
    row_statistics_kernel,
)
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant

Slices = Sequence[tuple[int, int]]
"""Row range [start, stop) of each expert, for one to three experts. The ranges cover all packed rows in order."""

Norm = tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]
"""Tensors of a sub-LN: the mean of each row, 1 / standard deviation of each row, one scale per expert, and one shift
per expert. The statistics are float32, and cover the columns of all ranks. The scales and shifts have this rank's
columns."""

BLOCK = {"ROWS": 16, "COLUMNS": 128}
"""Rows and columns that a Triton program with 4 warps computes: 16 values per thread, loaded 8 at a time."""

SPAN = 128
"""Number of rows over which one Triton program sums the gradients of a norm's scale and shift."""

NUM_WARPS = 4


def build_stops(slices: Slices) -> tuple[int, int, int]:
    """Returns three stop rows, one per expert. If there are fewer than three experts, the last stop row is repeated."""
    assert 1 <= len(slices) <= 3, f"multiway FFN: the kernels take one to three experts, not {len(slices)}"
    stops = [stop for _, stop in slices]
    first, second, third = stops + stops[-1:] * (3 - len(stops))
    return first, second, third


def count_row_tiles(slices: Slices, rows: int) -> int:
    """Returns the number of row tiles. A tile has at most `rows` rows, all of one expert."""
    return sum(ceil_div(stop - start, rows) for start, stop in slices)


def row_statistics(x_TF: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    """Computes the mean of each row, and the sum of squared deviations from the mean, (T,) float32 each.

    Args:
        x_TF: rows, contiguous.
        gelu: whether to compute the statistics of gelu(x) instead of x.
    """
    num_rows, width = x_TF.shape
    mean_T, squares_T = (x_TF.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    if num_rows:
        constants = (width, next_power_of_2(width), gelu)
        _ROW_STATISTICS.prepare((num_rows,), (), constants, num_warps=NUM_WARPS)(x_TF, mean_T, squares_T)
    return mean_T, squares_T


def normalize(x_TF: Tensor, gelu: bool, norm: Norm | None, slices: Slices) -> Tensor:
    """Computes LN(gelu(x)) or LN(x) from given statistics of each row. Without a norm, computes gelu(x) or copies x.

    Args:
        x_TF: rows, contiguous.
        gelu: whether to apply the exact (erf) GELU first.
        norm: sub-LN, including the statistics of each row; None for no norm.
        slices: row range [start, stop) of each expert.
    """
    n_TF = torch.empty_like(x_TF)
    mean_T, rstd_T, scales, shifts = norm or (x_TF, x_TF, (x_TF,), (x_TF,))
    tensors = (x_TF, mean_T, rstd_T, *for_experts(scales), *for_experts(shifts), n_TF)
    _launch(_NORMALIZE, tensors, slices, x_TF.shape[1], (gelu, norm is not None), BLOCK["ROWS"])
    return n_TF


def norm_gradient_sums(
    dn_TF: Tensor, x_TF: Tensor, gelu: bool, norm: Norm, slices: Slices
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Computes the gradients of a sub-LN's parameters, and the row sums that `norm_gradient` needs.

    The row sums cover this rank's columns. Add the row sums of all ranks before you call `norm_gradient`. All results
    are deterministic.

    Args:
        dn_TF: gradient of the norm's output, contiguous.
        x_TF: input of the norm, or of the GELU before the norm; contiguous.
        gelu: whether a GELU precedes the norm.
        norm: sub-LN.
        slices: row range [start, stop) of each expert; an expert without rows gets zero gradients.

    Returns:
        The row sums, (2, T) float32: first of dn * scale, then of dn * scale * xhat, where xhat is the standardised
        row. Then two lists with one gradient per expert, in x's dtype: the gradients of the scales, and the gradients
        of the shifts.
    """
    (num_rows, width), (mean_T, rstd_T, scales, _) = x_TF.shape, norm
    row_tiles = [count_row_tiles(slices[:index], SPAN) for index in range(len(slices) + 1)]
    column_tiles = ceil_div(width, BLOCK["COLUMNS"])
    row_sums = mean_T.new_empty(column_tiles, 2, num_rows)
    column_sums = mean_T.new_empty(row_tiles[-1], 2, width)
    tensors = (dn_TF, x_TF, mean_T, rstd_T, *for_experts(scales), row_sums, column_sums)
    _launch(_NORM_GRADIENT_SUMS, tensors, slices, width, (gelu, SPAN), SPAN)
    gradients = [column_sums[first:stop].sum(0).to(x_TF.dtype).unbind() for first, stop in pairwise(row_tiles)]
    return row_sums.sum(0), [d_scale for d_scale, _ in gradients], [d_shift for _, d_shift in gradients]


def norm_gradient(
    dn_TF: Tensor,
    x_TF: Tensor,
    gelu: bool,
    norm: Norm | None,
    sums_2T: Tensor | None,
    total_width: int,
    slices: Slices,
) -> Tensor:
    """Computes the gradient dx of x, the input of a sub-LN or of the GELU before it. Overwrites `dn_TF` with dx.

    dx = gelu'(x) * rstd * (dn * scale - sums[0] / total_width - xhat * sums[1] / total_width), where xhat is the
    standardised row. Without a GELU, gelu'(x) is 1. Without a norm, dx = gelu'(x) * dn.

    Args:
        dn_TF: gradient of the norm's output, contiguous. Without a norm, gradient of the GELU's output.
        x_TF: input of the norm, or of the GELU before the norm; contiguous.
        gelu: whether a GELU precedes the norm.
        norm: sub-LN, or None.
        sums_2T: row sums from `norm_gradient_sums`, added over all ranks; None without a norm.
        total_width: columns per row on all ranks together.
        slices: row range [start, stop) of each expert.
    """
    assert (norm is None) == (sums_2T is None), "multiway FFN: sums belong to a norm"
    mean_T, rstd_T, scales, _ = norm or (x_TF, x_TF, (x_TF,), ())
    sums_2T = x_TF if sums_2T is None else sums_2T
    tensors = (dn_TF, x_TF, mean_T, rstd_T, *for_experts(scales), sums_2T, dn_TF)
    constants = (total_width, gelu, norm is not None)
    _launch(_NORM_GRADIENT, tensors, slices, dn_TF.shape[1], constants, BLOCK["ROWS"])
    return dn_TF


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the kernel variants that are compiled ahead of time for the sub-LN. All architectures get the same
    variants.
    """
    result = []
    for element, width in (("bf16", 6144), ("bf16", 3072)):
        flags = {"GELU": True, "NORM": True}
        for kernel, constants in (
            (row_statistics_kernel, {"BLOCK": next_power_of_2(width), "GELU": True}),
            (normalize_kernel, {**flags, **BLOCK}),
            (norm_gradient_sums_kernel, {"GELU": True, "SPAN": SPAN, **BLOCK}),
            (norm_gradient_kernel, {"WIDTH": width, **flags, **BLOCK}),
        ):
            types = dict.fromkeys((x for x in kernel.arg_names if x in _ELEMENTS or x[:5] in _ELEMENTS), f"*{element}")
            types |= {x: "*fp32" for x in kernel.arg_names if x.endswith("_ptr") and x not in types}
            types |= {x: "i32" for x in kernel.arg_names if x in ("stop_0", "stop_1", "stop_2")}
            result.append(
                build_variant(
                    f"sub_norm {kernel.__name__.removesuffix('_kernel')} {element} {width}",
                    kernel,
                    types,
                    {"N": width, **constants},
                    num_warps=NUM_WARPS,
                    num_stages=3,
                    is_common=False,
                    is_memory_bound=True,
                )
            )
    return result


_ELEMENTS = ("x_ptr", "n_ptr", "dn_ptr", "dx_ptr", "scale", "shift")
"""Arguments whose elements have the rows' dtype. "scale" and "shift" stand for all arguments whose names begin with
these words. All other pointers have float32 elements."""


_ROW_STATISTICS = KernelLauncher(row_statistics_kernel)
_NORMALIZE = KernelLauncher(normalize_kernel)
_NORM_GRADIENT_SUMS = KernelLauncher(norm_gradient_sums_kernel)
_NORM_GRADIENT = KernelLauncher(norm_gradient_kernel)


def _launch(
    launcher: KernelLauncher,
    tensors: tuple[Tensor, ...],
    slices: Slices,
    width: int,
    constants: tuple[int, ...],
    rows: int,
) -> None:
    """Launches a kernel whose Triton programs each compute `rows` rows and BLOCK["COLUMNS"] columns."""
    assert all(map(Tensor.is_contiguous, tensors)), "sub-LN: the kernels' strides are those of contiguous rows"
    grid = (count_row_tiles(slices, rows), ceil_div(width, BLOCK["COLUMNS"]))
    if grid[0]:
        values = (width, *constants, *BLOCK.values())
        launcher.prepare(grid, build_stops(slices), values, num_warps=NUM_WARPS)(*tensors)
