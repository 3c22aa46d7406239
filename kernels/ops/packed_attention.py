"""Computes attention within each sequence of packed rows. A sequence has one or two row ranges.

On a CPU, the op runs PyTorch's flash attention on buckets of sequences with similar lengths. On a GPU, it runs the
fastest implementation: the Triton kernels in `triton/packed_attention.py`, the CUDA C++ kernels, or PyTorch's
attention.
"""

# T packed rows, H heads, K head width, S rows of one sequence.

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from beit3_ds.kernels.ops import cuda_kernels
from beit3_ds.kernels.ops.attention_plan import (
    PADDING_ALLOWANCE,
    Ranges,
    TilePlan,
    captioning_mask,
    image_rows,
    plan_attention,
    plan_tiles,
)
from beit3_ds.kernels.ops.bucket_attention import attend
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.ops.varlen_attention import varlen_attention
from beit3_ds.kernels.prepared import Prepared
from beit3_ds.kernels.triton.architecture import architecture_of, is_on_gpu

if TYPE_CHECKING:
    from beit3_ds.kernels.triton.packed_attention_launch import AttentionTiling


_WIDEST_HEAD = 128  # columns of a head that our kernels take


def packed_attention_reference(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, causal_captions: bool = False
) -> Tensor:
    """Computes `packed_attention` in plain PyTorch, sequence by sequence."""
    y_THK = torch.zeros_like(q_THK)
    for sequence in ranges:
        rows = torch.cat([torch.arange(start, stop, device=q_THK.device) for start, stop in sequence])
        q_HSK, k_HSK, v_HSK = (x[rows].transpose(0, 1) for x in (q_THK, k_THK, v_THK))
        scores_HSS = q_HSK @ k_HSK.transpose(1, 2) * q_HSK.shape[-1] ** -0.5
        if causal_captions:
            scores_HSS = scores_HSS.masked_fill(
                ~captioning_mask(len(rows), image_rows(sequence), rows.device), -torch.inf
            )
        y_THK = y_THK.index_copy(0, rows, (scores_HSS.softmax(-1) @ v_HSK).transpose(0, 1))
    return y_THK


def packed_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    ranges: Ranges,
    *,
    causal_captions: bool = False,
) -> Tensor:
    """Computes attention from each row to the rows of its own sequence. Scores are scaled by 1 / sqrt(K).

    Args:
        q_THK: queries; k_THK and v_THK have the same shape and dtype.
        ranges: row ranges of each sequence. Each row is in exactly one range.
        causal_captions: whether to apply the captioning mask to sequences with two ranges. The first range is an image,
            and the second range is a caption. With the mask, rows of the image see only the image. Rows of the caption
            see the image, and the caption up to their own position. Sequences with one range stay bidirectional.

    Returns:
        y_THK, the attention output of each row and head, in q's dtype.
    """
    if not runs_kernels(q_THK):
        return _attend_in_buckets(q_THK, k_THK, v_THK, ranges, causal_captions)
    is_differentiated = torch.is_grad_enabled() and q_THK.requires_grad
    y_THK: Tensor = _ATTENTION(q_THK, k_THK, v_THK, ranges, causal_captions, is_differentiated)
    return y_THK


def runs_kernels(q_THK: Tensor) -> bool:
    """Returns whether `packed_attention` may use its GPU kernels; otherwise it uses PyTorch's operations.

    The kernels support heads with at most 128 columns, and all dtypes except float64. Before their first use on a
    device, the kernels are checked (`self_check`). If the check fails, the result is False.
    """
    head_size = q_THK.shape[-1]
    return head_size <= _WIDEST_HEAD and KERNELS.accept(q_THK, head_size=head_size)


def _attend_in_buckets(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, causal_captions: bool, *rest: Any
) -> Tensor:
    # For heads that are too wide for our kernels, only PyTorch's flash attention is fast, and it takes no mask.
    allowance = 1.0 if q_THK.shape[2] > _WIDEST_HEAD and q_THK.is_cuda else PADDING_ALLOWANCE
    return attend(q_THK, k_THK, v_THK, plan_attention(ranges, q_THK.device, causal_captions, allowance))


def _attend_by_varlen(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, *rest: Any) -> Tensor:
    return varlen_attention(q_THK, k_THK, v_THK, ranges)


def _takes_varlen(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, causal_captions: bool, *rest: Any
) -> bool:
    head_size = q_THK.shape[2]
    is_half = q_THK.dtype in (torch.bfloat16, torch.float16)
    fits = is_half and head_size % 8 == 0 and q_THK.numel() > 0 and not causal_captions
    return fits and VARLEN.accept(q_THK, head_size=head_size)


def _takes_cuda_cpp(q_THK: Tensor, *rest: Any) -> bool:
    takes = cuda_kernels.is_built() and cuda_kernels.takes_attention(q_THK)
    return takes and KERNELS.accept(q_THK, head_size=q_THK.shape[-1], cuda_cpp=True)


def _attend_by_cuda_cpp(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, *rest: Any) -> Tensor:
    return _run_operator(q_THK, k_THK, v_THK, ranges, rest[0], cuda_cpp=True)


def _run_operator(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    ranges: Ranges,
    causal_captions: bool,
    *rest: Any,
    cuda_cpp: bool = False,
) -> Tensor:
    tile_size = _tiling(q_THK).tile
    plan = plan_tiles(ranges, tile_size, q_THK.device)
    y_THK: Tensor = PackedAttention.apply(q_THK, k_THK, v_THK, plan, tile_size, causal_captions, cuda_cpp)
    return y_THK


def check_kernels(device: torch.device, dtype: torch.dtype, head_size: int, cuda_cpp: bool = False) -> None:
    """Compares the kernels with the reference, forward and backward, for three sequences; one has two row ranges.

    Args:
        device: device of the kernels.
        dtype: dtype of queries, keys and values.
        head_size: columns per head, K.
        cuda_cpp: whether to use the CUDA C++ kernel for the forward pass.

    Raises:
        WrongResultError: if a result is wrong.
    """
    for captions in (False, True):
        _compare(
            partial(_run_operator, causal_captions=captions, cuda_cpp=cuda_cpp), device, dtype, head_size, captions
        )


KERNELS = TrustedKernels("packed_attention", check_kernels)
"""Decides whether `packed_attention` may use its Triton and CUDA C++ kernels. A check at the first use on a device must
pass."""


def check_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> None:
    """Compares PyTorch's variable-length attention with the reference, for the same sequences as `check_kernels`.

    Raises:
        WrongResultError: if a result is wrong.
    """
    _compare(varlen_attention, device, dtype, head_size, captions=False)


VARLEN = TrustedKernels("PyTorch's varlen attention", check_varlen)
"""Decides whether PyTorch's variable-length attention may be used. A check at the first use on a device must pass."""


def _compare(
    attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, head_size: int, captions: bool
) -> None:
    ranges = (((0, 120), (121, 150)), ((120, 121),), ((150, 169),))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 169, 2, head_size, generator=generator).to(device, dtype).unbind()
    ours = with_gradients(partial(attention, ranges=ranges))
    reference = with_gradients(partial(packed_attention_reference, ranges=ranges, causal_captions=captions))
    check_against_reference(("y", "dq", "dk", "dv"), ours(*inputs), reference, inputs)


def _rehearse(attention: Callable[..., Tensor]) -> Callable[..., Any]:
    """Returns the function that `MeasuredOp` measures. It runs `attention` and, if gradients are needed, a backward
    pass.
    """

    def run(*arguments: Any) -> Any:
        *inputs, ranges, causal_captions, is_differentiated = arguments
        if not is_differentiated:
            return attention(*arguments)
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            y_THK = attention(*leaves, ranges, causal_captions, True)
            return torch.autograd.grad(y_THK, leaves, y_THK.detach())

    return run


_ATTENTION = MeasuredOp(
    "packed_attention",
    {
        "triton": _run_operator,
        "cuda": _attend_by_cuda_cpp,
        "varlen": _attend_by_varlen,
        "library": _attend_in_buckets,
    },
    accepts={"cuda": _takes_cuda_cpp, "varlen": _takes_varlen},
    ignores=(3,),
    rehearse=_rehearse,
)


def _tiling(q_THK: Tensor) -> "AttentionTiling":
    from beit3_ds.kernels.triton.packed_attention_launch import choose_tiling  # Triton is needed on a GPU only

    return choose_tiling(architecture_of(q_THK.device), q_THK.shape[-1], q_THK.dtype)


class PackedAttention(torch.autograd.Function):
    """Computes packed attention with this project's kernels, tile by tile.

    On a CPU, runs plain PyTorch, sequence by sequence. The CPU path is only for checks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_THK: Tensor,
        k_THK: Tensor,
        v_THK: Tensor,
        plan: TilePlan,
        tile_size: int,
        causal_captions: bool,
        cuda_cpp: bool = False,
    ) -> Tensor:
        """Computes the attention output y_THK.

        Args:
            ctx: context of autograd.
            q_THK: queries; k_THK and v_THK have the same shape and dtype.
            plan: tables of the sequences and tiles.
            tile_size: rows per tile.
            causal_captions: see `packed_attention`.
            cuda_cpp: whether to use the CUDA C++ kernel for the forward pass on a GPU.
        """
        q_THK, k_THK, v_THK = q_THK.contiguous(), k_THK.contiguous(), v_THK.contiguous()
        attend = cuda_kernels.packed_attention_forward if cuda_cpp and is_on_gpu(q_THK) else _FORWARD
        y_THK, lse_HT = attend(q_THK, k_THK, v_THK, *plan, tile_size, causal_captions)
        ctx.save_for_backward(q_THK, k_THK, v_THK, y_THK, lse_HT, *plan)
        ctx.tile_size, ctx.causal_captions = tile_size, causal_captions
        return y_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THK: Tensor) -> tuple[Tensor | None, ...]:
        """Returns the gradients dq, dk and dv, from `dy_THK`, the gradient of the attention output."""
        gradients = _BACKWARD(dy_THK.contiguous(), *ctx.saved_tensors, ctx.tile_size, ctx.causal_captions)
        return (*gradients, None, None, None, None)


def forward_plain(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tile_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """Computes attention in plain PyTorch, one sequence at a time, as a reference for the forward kernel. Only checks
    call this function.

    Returns:
        y_THK, and the log-sum-exp of each query's scaled scores, (H, T).
    """
    y_THK = torch.empty_like(q_THK)
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=_accumulator(q_THK))
    for rows, seen in _sequences(sequences_Q4, causal):
        q_HSK, k_HSK, v_HSK = (x[rows].transpose(0, 1).to(lse_HT.dtype) for x in (q_THK, k_THK, v_THK))
        scores_HSS = (q_HSK @ k_HSK.mT * q_HSK.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        lse_HT[:, rows] = scores_HSS.logsumexp(-1)
        y_THK[rows] = (scores_HSS.softmax(-1) @ v_HSK).transpose(0, 1).to(y_THK.dtype)
    return y_THK, lse_HT


def backward_plain(
    dy_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    y_THK: Tensor,
    lse_HT: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tile_size: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes in plain PyTorch what the backward kernels compute: dq, dk and dv. This function is only called by
    checks.
    """
    gradients = torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK)
    scale = q_THK.shape[-1] ** -0.5
    for rows, seen in _sequences(sequences_Q4, causal):
        dy_HSK, q_HSK, k_HSK, v_HSK, y_HSK = (
            x[rows].transpose(0, 1).to(lse_HT.dtype) for x in (dy_THK, q_THK, k_THK, v_THK, y_THK)
        )
        p_HSS = (q_HSK @ k_HSK.mT * scale - lse_HT[:, rows, None]).exp() * seen
        delta_HS1 = (dy_HSK * y_HSK).sum(-1, keepdim=True)
        ds_HSS = p_HSS * (dy_HSK @ v_HSK.mT - delta_HS1) * scale
        parts = ds_HSS @ k_HSK, ds_HSS.mT @ q_HSK, p_HSS.mT @ dy_HSK
        for gradient_THK, part_HSK in zip(gradients, parts, strict=True):
            gradient_THK[rows] = part_HSK.transpose(0, 1).to(gradient_THK.dtype)
    return gradients


@Prepared
def _forward_triton(q_THK: Tensor, *rest: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    from beit3_ds.kernels.triton.packed_attention_launch import forward  # Triton is needed on a GPU only

    *tensors, tile_size, causal = rest
    return forward.prepare(q_THK, *tensors, _tiling(q_THK)._replace(tile=tile_size), causal)


@Prepared
def _backward_triton(dy_THK: Tensor, *rest: Any) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    from beit3_ds.kernels.triton.packed_attention_launch import backward

    *tensors, tile_size, causal = rest
    return backward.prepare(dy_THK, *tensors, _tiling(dy_THK)._replace(tile=tile_size), causal)


# There is one implementation each: `_ATTENTION` chooses between attention's forward and backward passes together.
_FORWARD = MeasuredOp("packed_attention_forward", {"triton": _forward_triton}, on_cpu=forward_plain)
_BACKWARD = MeasuredOp("packed_attention_backward", {"triton": _backward_triton}, on_cpu=backward_plain)


def _sequences(sequences_Q4: Tensor, causal_captions: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns the rows and the attention mask of each sequence of S rows.

    The row numbers are (S,) int64. The mask is (S, S) bool, and is True where a query sees a key.
    """
    result = []
    for start_1, length_1, start_2, length_2 in sequences_Q4.tolist():
        rows = torch.cat([torch.arange(start_1, start_1 + length_1), torch.arange(start_2, start_2 + length_2)])
        result.append((rows, captioning_mask(len(rows), length_1 if causal_captions else len(rows), rows.device)))
    return result


def _accumulator(x: Tensor) -> torch.dtype:
    """Returns the dtype for sums: float32 if `x` is in half precision, otherwise the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)
