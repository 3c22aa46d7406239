"""Calls the CUDA C++ kernels (`kernels/csrc`) if they are built (docs/kernels_cuda.md)."""

# T packed rows, D input width, F output width, H heads, K head width, N tiles.

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.device_copy import copy_to_device
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.ops.self_check import TrustedKernels

MAX_EXPERTS = 4
"""Maximum number of experts per launch (kMaxExperts in csrc/arguments.h)."""

TILE_ROWS = 128
"""Rows per tile of the grouped GEMM (kGroupedGemmTileRows in csrc/launch.h)."""

_HALF_PRECISIONS = (torch.bfloat16, torch.float16)


def is_built() -> bool:
    """Returns whether the CUDA C++ kernels are installed, without loading them.

    `BEIT3_BUILD_CUDA=1 pip install --no-build-isolation .` builds the kernels.
    """
    return importlib.util.find_spec("beit3_ds.kernels.cuda_operators") is not None


def runs_grouped_gemm(x_TD: Tensor, weights: Sequence[Tensor]) -> bool:
    """Returns whether `grouped_gemm` can run on these rows and weights.

    The tensors must be in half precision and on a GPU, all widths must be divisible by 8, and there must be at most
    `MAX_EXPERTS` weights. Returns False with a warning if the kernel is not built, or if it fails the check at its
    first use (`self_check`).
    """
    widths = weights[0].shape
    fits = x_TD.dtype in _HALF_PRECISIONS and len(weights) <= MAX_EXPERTS and all(n % 8 == 0 for n in widths)
    return fits and GROUPED_GEMM.accept(x_TD)


def grouped_gemm(
    x_TD: Tensor, slices: Sequence[tuple[int, int]], weights: Sequence[Tensor], biases: Sequence[Tensor], *, gelu: bool
) -> tuple[Tensor, Tensor]:
    """Applies each expert's linear layer to its own rows in one kernel launch; has no backward pass.

    Computes u[start:stop] = x[start:stop] @ w_FD.T + b_F for each expert. u is rounded to x's dtype. Then, optionally,
    computes a = GELU(u) with the exact (erf) GELU.

    Args:
        x_TD: packed rows, contiguous, bfloat16 or float16 (see `runs_grouped_gemm`).
        slices: row range [start, stop) of each expert; the ranges cover all rows in order.
        weights: one contiguous matrix (F, D) per expert in x's dtype, for output width F and input width D.
        biases: one vector (F,) per expert.
        gelu: whether to compute a.

    Returns:
        u_TF and a_TF in x's dtype. If `gelu` is false, a has 0 rows.
    """
    tiles_N3 = plan_row_tiles(tuple(slices), TILE_ROWS, x_TD.device)
    return _operators().grouped_gemm(x_TD, list(weights), list(biases), tiles_N3, TILE_ROWS, gelu)


@lru_cache(maxsize=16)  # the same for all layers that compute all sequences
def plan_row_tiles(slices: Sequence[tuple[int, int]], tile_rows: int, device: torch.device) -> Tensor:
    """Divides each expert's rows into tiles of at most `tile_rows` rows.

    Returns:
        Expert index, first row and stop row of each of N tiles, (N, 3) int32.
    """
    tiles = [
        (expert, first, min(first + tile_rows, stop))
        for expert, (start, stop) in enumerate(slices)
        for first in range(start, stop, tile_rows)
    ]
    return copy_to_device(torch.tensor(tiles, dtype=torch.int32).view(-1, 3), device)


def takes_attention(q_THK: Tensor) -> bool:
    """Returns whether `packed_attention_forward` supports these queries.

    The queries must be in half precision and on a GPU. The head width must be a multiple of 8 and at most 128.
    """
    return q_THK.is_cuda and q_THK.dtype in _HALF_PRECISIONS and q_THK.shape[2] % 8 == 0 and q_THK.shape[2] <= 128


def packed_attention_forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tile_size: int,
    causal_captions: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the forward pass of `packed_attention` with the CUDA C++ kernel.

    Args:
        q_THK: queries that `takes_attention` accepts; contiguous, like k_THK and v_THK.
        sequences_Q4: see `TilePlan.sequences_Q4`.
        tiles_N2: see `TilePlan.tiles_N2`.
        tile_size: rows per tile, 64 or 128.
        causal_captions: whether captions have a causal mask (see `packed_attention`).

    Returns:
        y_THK, and the log-sum-exp of each query's scaled scores, (H, T) float32 for H heads and T rows. Rows that
        belong to no sequence are undefined.
    """
    return _operators().packed_attention(q_THK, k_THK, v_THK, sequences_Q4, tiles_N2, tile_size, causal_captions)


def check_grouped_gemm(device: torch.device, dtype: torch.dtype) -> None:
    """Compares `grouped_gemm` with the reference for three experts, which have 150 rows, no rows and one row.

    Raises:
        WrongResultError: if a result is wrong.
    """
    slices = ((0, 150), (150, 150), (150, 151))
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(151, 200, generator=generator)
    weights, biases = torch.randn(3, 136, 200, generator=generator) / 200**0.5, torch.randn(3, 136, generator=generator)
    inputs = tuple(tensor.to(device, dtype) for tensor in (x_TD, weights, biases))

    def reference(x_TD: Tensor, weights: Tensor, biases: Tensor) -> tuple[Tensor, ...]:
        parts = [F.linear(x_TD[start:stop], weights[i], biases[i]) for i, (start, stop) in enumerate(slices)]
        u_TF = torch.cat(parts)
        return u_TF, F.gelu(u_TF)

    results = grouped_gemm(inputs[0], slices, inputs[1].unbind(), inputs[2].unbind(), gelu=True)
    check_against_reference(("u", "a"), results, reference, inputs)


GROUPED_GEMM = TrustedKernels("grouped_gemm in CUDA C++", check_grouped_gemm)
"""Decides whether `grouped_gemm` may use its CUDA C++ kernel. A check at the first use on a device must pass."""


@lru_cache
def _operators() -> Any:
    spec = importlib.util.find_spec("beit3_ds.kernels.cuda_operators")
    assert spec is not None and spec.origin is not None, (
        "the kernels in CUDA C++ are not built: see docs/kernels_cuda.md"
    )
    torch.ops.load_library(spec.origin)
    return torch.ops.beit3_ds_cuda
