"""Launches the attention kernels, chooses their tile sizes, and lists the variants to compile ahead of time."""

# T packed rows, H heads, K head width, Q sequences, N tiles.

from __future__ import annotations  # else every preparation evaluates those of nested functions

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton.budgets import spilling_variants
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, Launch, TunedLaunch, row_class
from beit3_ds.kernels.triton.launch_sizes import next_power_of_2
from beit3_ds.kernels.triton.packed_attention import forward_kernel, key_value_gradient_kernel, query_gradient_kernel
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant


class KernelConfig(NamedTuple):
    """Holds compile settings of one of the attention kernels."""

    block: int
    """Number of positions per loop step. These are positions of queries in `key_value_gradient_kernel`, and positions
    of keys in the other two kernels."""
    num_warps: int
    """Warps per Triton program."""
    num_stages: int
    """Number of loop steps whose memory loads overlap (software pipelining)."""


class AttentionTiling(NamedTuple):
    """Holds settings of the three attention kernels for one GPU architecture, head width and dtype."""

    tile: int
    """Number of positions per Triton program. These are positions of keys in `key_value_gradient_kernel`, and positions
    of queries in the other two kernels."""
    forward: KernelConfig
    query_gradient: KernelConfig
    key_value_gradient: KernelConfig


@lru_cache
def choose_tiling(architecture: int, head_size: int, dtype: torch.dtype) -> AttentionTiling:
    """Returns one tile size for the three attention kernels, and the compile settings of each kernel.

    `candidate_tilings` lists the possible tile sizes. For each tile size, it lists one or more compile settings per
    kernel. This function chooses the first tile size at which every kernel has settings without register spills. Each
    kernel gets the first of its settings that spill no registers. If there is no such tile size, the last element of
    `candidate_tilings` is returned. budgets.json records which settings spill registers with the installed version of
    Triton.

    Args:
        architecture: GPU architecture: 80, 90 or 100. For other GPUs with at least 99 KB of shared memory per thread
            block, pass 80.
        head_size: columns per head, K; at most 128.
        dtype: dtype of q, k and v. float32 is multiplied exactly, not on tensor cores.
    """
    candidates = candidate_tilings(architecture, head_size, dtype)
    spilling = spilling_variants(triton.__version__, architecture)

    def spills(tiling: AttentionTiling, kernel: int) -> bool:
        cases = [case for case in _CASES if case[0] == dtype and column_blocks(case[1]) == column_blocks(head_size)]
        return any(_case_variants(architecture, *case, tiling)[kernel].name in spilling for case in cases)

    for tile in dict.fromkeys(tiling.tile for tiling in candidates):
        same = [tiling for tiling in candidates if tiling.tile == tile]
        fitting = [[_configs(tiling)[kernel] for tiling in same if not spills(tiling, kernel)] for kernel in range(3)]
        if all(fitting):
            forward, query_gradient, key_value_gradient = (configs[0] for configs in fitting)
            return AttentionTiling(tile, forward, query_gradient, key_value_gradient)
    return candidates[-1]


def _configs(tiling: AttentionTiling) -> tuple[KernelConfig, KernelConfig, KernelConfig]:
    return tiling.forward, tiling.query_gradient, tiling.key_value_gradient


def candidate_tilings(architecture: int, head_size: int, dtype: torch.dtype) -> list[AttentionTiling]:
    """Returns the settings that are compiled ahead of time, in order of preference (arguments: see `choose_tiling`)."""
    if dtype == torch.float32:
        return [
            AttentionTiling(32, KernelConfig(32, 8, stages), KernelConfig(16, 8, stages), KernelConfig(32, 8, stages))
            for stages in (2, 3)
        ]
    narrow = AttentionTiling(64, KernelConfig(64, 8, 2), KernelConfig(32, 8, 2), KernelConfig(32, 8, 2))
    if architecture == 80 and head_size > 88:
        return [narrow]
    if architecture == 80:
        return [AttentionTiling(128, KernelConfig(64, 8, 3), KernelConfig(32, 8, 3), KernelConfig(32, 8, 2)), narrow]
    forward = KernelConfig(128, 8, 2) if architecture == 100 and head_size <= 64 else KernelConfig(64, 8, 3)
    return [
        AttentionTiling(128, forward, KernelConfig(64, 8, 2), KernelConfig(64 if head_size <= 96 else 32, 8, 2)),
        narrow,
    ]


def column_blocks(head_size: int) -> tuple[int, int]:
    """Splits the columns of a head into two blocks, and returns their widths A and B: (64, 32) for 88 columns.

    Each width is a power of two and at least 16. Together, the blocks cover the head. If a single block that covers the
    head is not wider than two blocks together, there is only a single block, and B is 0.
    """
    whole = max(16, next_power_of_2(head_size))
    block_a = whole // 2
    block_b = max(16, next_power_of_2(head_size - block_a))
    return (block_a, block_b) if block_a >= 16 and block_a + block_b < whole else (whole, 0)


@Prepared
def forward(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tiling: AttentionTiling,
    causal_captions: bool,
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Prepares the computation of the attention output and the log-sum-exp of each query.

    Args:
        q_THK: queries, contiguous. The same applies to keys k_THK and values v_THK.
        sequences_Q4: see `TilePlan.sequences_Q4`.
        tiles_N2: see `TilePlan.tiles_N2`. A tile has `tiling.tile` positions.
        tiling: tile sizes and compile settings of the kernels.
        causal_captions: whether captions have a causal mask (see `packed_attention`).

    Returns:
        Function that computes y_THK and the log-sum-exp of each query's scaled scores. A call of the decorated name
        (`Prepared`) prepares and computes in one step. The log-sum-exp is (H, T) float32. For tokens that belong to no
        sequence, both results are undefined.
    """
    num_rows, num_heads, _ = q_THK.shape
    launch = _prepare(_FORWARD, q_THK, tiles_N2, tiling.tile, tiling.forward, causal_captions)

    def run(
        q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, sequences_Q4: Tensor, tiles_N2: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        y_THK = torch.empty_like(q_THK)
        lse_HT = q_THK.new_empty(num_heads, num_rows, dtype=torch.float32)
        launch(q_THK, k_THK, v_THK, y_THK, lse_HT, sequences_Q4, tiles_N2)
        return y_THK, lse_HT

    return run


@Prepared
def backward(
    dy_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    y_THK: Tensor,
    lse_HT: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tiling: AttentionTiling,
    causal_captions: bool,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Prepares the computation of the gradients dq, dk and dv. The kernels use no atomics, so the results are
    deterministic.

    Args:
        dy_THK: gradient of y_THK.
        q_THK: see `forward`, also for k_THK, v_THK, sequences_Q4, tiles_N2, tiling and causal_captions.
        y_THK: output that `forward` returned.
        lse_HT: log-sum-exp that `forward` returned.

    Returns:
        Function that computes dq, dk and dv. A call of the decorated name (`Prepared`) prepares and computes in one
        step.
    """
    kernels = (_QUERY_GRADIENT, tiling.query_gradient), (_KEY_VALUE_GRADIENT, tiling.key_value_gradient)
    launch_query, launch_key_value = (
        _prepare(launcher, q_THK, tiles_N2, tiling.tile, config, causal_captions) for launcher, config in kernels
    )

    def run(
        dy_THK: Tensor,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        y_THK: Tensor,
        lse_HT: Tensor,
        sequences_Q4: Tensor,
        tiles_N2: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq_THK, dk_THK, dv_THK = torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK)
        delta_HT, plan = torch.empty_like(lse_HT), (sequences_Q4, tiles_N2)
        launch_query(q_THK, k_THK, v_THK, y_THK, dy_THK, lse_HT, delta_HT, dq_THK, *plan)
        launch_key_value(q_THK, k_THK, v_THK, dy_THK, lse_HT, delta_HT, dk_THK, dv_THK, *plan)
        return dq_THK, dk_THK, dv_THK

    return run


def constants(num_heads: int, head_size: int, tile: int, block: int, causal_captions: bool) -> dict[str, Any]:
    """Returns by name the constexpr arguments that all three attention kernels have."""
    block_a, block_b = column_blocks(head_size)
    return {
        "H": num_heads,
        "K": head_size,
        "A": block_a,
        "B": block_b,
        "TILE": tile,
        "BLOCK": block,
        "CAPTIONS": causal_captions,
        "SCALE": head_size**-0.5,
    }


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants to compile ahead of time, for the attention kernels.

    The giant model has 88 columns per head, and all smaller models have 64. Relative positions in windows of 14 x 14
    patches widen 88 columns to 120, and 64 columns to 96. Variants for 128 columns, the widest supported head, are also
    compiled.
    """
    return [
        variant
        for dtype, head_size, causal_captions in _CASES
        for tiling in candidate_tilings(architecture, head_size, dtype)
        for variant in _case_variants(architecture, dtype, head_size, causal_captions, tiling)
    ]


_CASES = (
    (torch.bfloat16, 64, False),
    (torch.bfloat16, 88, False),
    (torch.bfloat16, 88, True),
    (torch.bfloat16, 96, False),
    (torch.bfloat16, 120, False),
    (torch.bfloat16, 128, True),
    (torch.float16, 88, False),
    (torch.float16, 96, False),
    (torch.float32, 88, True),
    (torch.float32, 96, False),
    (torch.float32, 128, False),
)
"""Variants that are compiled ahead of time: dtype, columns per head, and whether captions have a causal mask."""


def _case_variants(
    architecture: int, dtype: torch.dtype, head_size: int, causal_captions: bool, tiling: AttentionTiling
) -> list[KernelVariant]:
    element = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    is_preferred = tiling == candidate_tilings(architecture, head_size, dtype)[0]
    note = (" captions" if causal_captions else "") + ("" if is_preferred else " alternative")
    result = []
    for kernel, config in (
        (forward_kernel, tiling.forward),
        (query_gradient_kernel, tiling.query_gradient),
        (key_value_gradient_kernel, tiling.key_value_gradient),
    ):
        values = constants(16, head_size, tiling.tile, config.block, causal_captions)
        types = dict.fromkeys((name for name in kernel.arg_names if name not in values), f"*{element}")
        types |= {"sequences_ptr": "*i32", "tiles_ptr": "*i32", "lse_ptr": "*fp32", "num_rows": "i32"}
        types |= {"delta_ptr": "*fp32"} if "delta_ptr" in types else {}
        result.append(
            build_variant(
                f"packed_attention {kernel.__name__.removesuffix('_kernel')} {element} K={head_size}{note}",
                kernel,
                types,
                values,
                num_warps=config.num_warps,
                num_stages=config.num_stages,
                is_common=(dtype, head_size, note) == (torch.bfloat16, 88, ""),
            )
        )
    return result


_FORWARD = KernelLauncher(forward_kernel)
_QUERY_GRADIENT = KernelLauncher(query_gradient_kernel)
_KEY_VALUE_GRADIENT = KernelLauncher(key_value_gradient_kernel)


def _prepare(
    launcher: KernelLauncher, q_THK: Tensor, tiles_N2: Tensor, tile: int, config: KernelConfig, causal_captions: bool
) -> TunedLaunch:
    """Prepares the launch of an attention kernel. On a GPU, tuning selects the number of pipeline stages."""
    (num_rows, num_heads, head_size), grid = q_THK.shape, (len(tiles_N2), q_THK.shape[1])
    assert q_THK.numel() < 2**31, f"packed_attention: {tuple(q_THK.shape)} has offsets beyond 32 bits"
    values = tuple(constants(num_heads, head_size, tile, config.block, causal_captions).values())

    def prepare(config: KernelConfig) -> Launch:
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return launcher.prepare(grid, (num_rows,), values, **options)

    case = launcher.name, row_class(num_rows), q_THK.dtype, config, *values
    return TunedLaunch(case, partial(_settings, config), prepare, is_empty=0 in grid)


def _settings(config: KernelConfig) -> list[KernelConfig]:
    """Returns three settings: `config` itself, a copy with one pipeline stage fewer, and a copy with one more.

    The number of pipeline stages does not change results.
    """
    return [config._replace(num_stages=config.num_stages + change) for change in (-1, 0, 1)]
