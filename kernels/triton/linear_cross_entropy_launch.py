"""Launches the cross entropy's kernels, and lists the variants that are compiled ahead of time."""

# M rows, N logits of a row, G groups of rows.

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops.vocabulary_tiles import ALIGNMENT
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher
from beit3_ds.kernels.triton.launch_sizes import ceil_div
from beit3_ds.kernels.triton.linear_cross_entropy import gradient_kernel, partials_kernel
from beit3_ds.kernels.triton.variant import KernelVariant, build_variant


class LogitsTiling(NamedTuple):
    """Holds compile and launch settings of the two kernels of the cross entropy."""

    partials_block: int
    """Number of logits of one row that each loop step of `partials_kernel` reads."""
    gradient_block: int
    """Vocabulary columns per Triton program of `gradient_kernel`."""
    gradient_rows: int
    """Rows that a Triton program of `gradient_kernel` computes per loop step."""
    gradient_programs: int
    """Approximate number of Triton programs of `gradient_kernel`. An H100 runs about this number at once."""
    num_stages: int
    """Number of loop steps whose memory loads overlap (software pipelining)."""


def choose_tiling(dtype: torch.dtype) -> LogitsTiling:
    """Returns the settings of the cross entropy's two kernels, for logits of `dtype`.

    A warp accesses 512 consecutive bytes at a time. With these settings, no kernel that is compiled ahead of time
    spills registers (budgets.json).
    """
    return LogitsTiling(4096, 512 // dtype.itemsize, 8, 528, 3)


PARTIALS_WARPS, GRADIENT_WARPS = 8, 4


def partials(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor, tiling: LogitsTiling
) -> None:
    """Updates the partial results of each row's cross entropy with the logits of one vocabulary tile.

    Args:
        logits_MN: logits without bias. The row stride is a multiple of ALIGNMENT elements.
        bias_N: bias of the logits.
        target_M: vocabulary index of each row's target, int64.
        first: vocabulary index of the tile's first column.
        partials_3M: partial results, float32, contiguous, updated in place: each row's largest logit, sum of exp(logit
            - largest), and target logit.
        tiling: settings of the kernel.
    """
    stride = _stride(logits_MN)
    if len(logits_MN) == 0:
        return
    assert partials_3M.is_contiguous() and target_M.is_contiguous(), "linear_cross_entropy: rows are next to each other"
    launch = _PARTIALS.prepare(
        (len(logits_MN),),
        (*logits_MN.shape, stride // ALIGNMENT, first),
        (tiling.partials_block, tiling.num_stages),
        num_warps=PARTIALS_WARPS,
    )
    launch(logits_MN, _padded(bias_N, stride), target_M, partials_3M)


def gradient(
    logits_MN: Tensor,
    bias_N: Tensor,
    target_M: Tensor,
    first: int,
    lse_M: Tensor,
    d_loss_M: Tensor,
    tiling: LogitsTiling,
) -> Tensor:
    """Overwrites the logits of one vocabulary tile with the gradients of the logits.

    The arguments that are not described here are those of `partials`.

    Args:
        logits_MN: logits without bias; overwritten with gradients.
        lse_M: log(sum exp(logits)) of each row over the whole vocabulary, float32, contiguous.
        d_loss_M: gradient of each row's loss, float32, contiguous.

    Returns:
        Sum of the gradients over rows, (N,) float32. The kernel uses no atomics, so the sum is deterministic.
    """
    (num_rows, width), stride = logits_MN.shape, _stride(logits_MN)
    assert all(x.is_contiguous() for x in (target_M, lse_M, d_loss_M)), "linear_cross_entropy: rows are not contiguous"
    num_blocks = ceil_div(stride, tiling.gradient_block)
    rows = ceil_div(num_rows, max(1, tiling.gradient_programs // num_blocks))
    rows = ceil_div(max(1, rows), tiling.gradient_rows) * tiling.gradient_rows
    groups = ceil_div(num_rows, rows)
    sum_GS = lse_M.new_empty(groups, stride)
    if groups:
        launch = _GRADIENT.prepare(
            (num_blocks, groups),
            (num_rows, rows, width, stride // ALIGNMENT, first),
            (tiling.gradient_block, tiling.gradient_rows, tiling.num_stages),
            num_warps=GRADIENT_WARPS,
        )
        launch(logits_MN, _padded(bias_N, stride), target_M, lse_M, d_loss_M, sum_GS)
    return sum_GS[:, :width].sum(0)


_PARTIALS = KernelLauncher(partials_kernel)
_GRADIENT = KernelLauncher(gradient_kernel)


def variants(architecture: int) -> list[KernelVariant]:
    """Returns the variants to compile ahead of time: one per kernel and dtype, because sizes are not constexpr."""
    result = []
    for element, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        tiling = choose_tiling(dtype)
        constants = {
            partials_kernel: {"BLOCK": tiling.partials_block},
            gradient_kernel: {"BLOCK": tiling.gradient_block, "ROWS": tiling.gradient_rows},
        }
        for kernel, num_warps in ((partials_kernel, PARTIALS_WARPS), (gradient_kernel, GRADIENT_WARPS)):
            values = {**constants[kernel], "STAGES": tiling.num_stages}
            types = dict.fromkeys((name for name in kernel.arg_names if name not in values), "i32")
            types |= {name: "*fp32" for name in types if name.endswith("_ptr")}
            types |= {"logits_ptr": f"*{element}", "bias_ptr": f"*{element}", "target_ptr": "*i64"}
            result.append(
                build_variant(
                    f"linear_cross_entropy {kernel.__name__.removesuffix('_kernel')} {element}",
                    kernel,
                    types,
                    values,
                    num_warps=num_warps,
                    num_stages=tiling.num_stages,
                    is_common=element == "bf16",
                    is_memory_bound=True,
                )
            )
    return result


def _stride(logits_MN: Tensor) -> int:
    stride = logits_MN.stride(0)
    assert logits_MN.stride(1) == 1 and stride % ALIGNMENT == 0, "linear_cross_entropy: rows are not aligned"
    assert len(logits_MN) * stride < 2**31, "linear_cross_entropy: offsets beyond 32 bits"
    return stride


def _padded(bias_N: Tensor, stride: int) -> Tensor:
    return F.pad(bias_N, (0, stride - len(bias_N)))
