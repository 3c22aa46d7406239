"""Computes attention within each sequence of a packed stream; a sequence consists of one or two row ranges.

On a CPU it runs PyTorch's flash attention on buckets of sequences of similar length. On a GPU it runs the operator
`beit3_ds::packed_attention` with the kernels of `triton/packed_attention.py`.
"""

# T packed rows, H heads, K head width; a bucket holds n sequences of at most S rows.

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops import cuda_kernels
from beit3_ds.kernels.ops.attention_plan import (
    AttentionPlan,
    Bucket,
    Ranges,
    image_rows,
    plan_attention,
    plan_tiles,
    visible_rows,
)
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.self_check import TrustedKernels

if TYPE_CHECKING:
    from beit3_ds.kernels.triton.packed_attention_launch import AttentionTiling


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
            scores_HSS = scores_HSS.masked_fill(~visible_rows(len(rows), image_rows(sequence), rows.device), -torch.inf)
        y_THK = y_THK.index_copy(0, rows, (scores_HSS.softmax(-1) @ v_HSK).transpose(0, 1))
    return y_THK


def packed_attention(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    ranges: Ranges,
    *,
    causal_captions: bool = False,
    cuda_cpp: bool = False,
) -> Tensor:
    """Computes the attention of every row to all rows of its own sequence, scaled by 1 / sqrt(K).

    Args:
        q_THK: queries; k_THK and v_THK have the same shape and dtype.
        ranges: the row ranges of each sequence; every row is in exactly one range.
        causal_captions: whether to mask sequences of two ranges for captioning. Then rows of the first range (an image)
            see that range only. Rows of the second range (its caption) see the first range, and the second up to
            themselves. Sequences of one range stay bidirectional.
        cuda_cpp: whether to use the forward kernel in CUDA C++ (`cuda_kernels`, which must be built) if it takes these
            queries. The backward pass uses Triton.

    Returns:
        y_THK, the outputs of all heads of every row, in q's dtype.
    """
    if not runs_kernels(q_THK):
        return attend(q_THK, k_THK, v_THK, plan_attention(ranges, q_THK.device, causal_captions))
    return _run_operator(q_THK, k_THK, v_THK, ranges, causal_captions, cuda_cpp and _runs_cuda_cpp(q_THK))


def runs_kernels(q_THK: Tensor) -> bool:
    """Returns whether `packed_attention` uses the GPU kernels and not PyTorch's operations.

    The kernels support heads of at most 128 columns and every dtype except float64. They must also pass their check at
    first use on the device (`self_check`).
    """
    head_size = q_THK.shape[-1]
    return head_size <= 128 and KERNELS.accept(q_THK, head_size=head_size)


def _runs_cuda_cpp(q_THK: Tensor) -> bool:
    return cuda_kernels.takes_attention(q_THK) and KERNELS.accept(q_THK, head_size=q_THK.shape[-1], cuda_cpp=True)


def _run_operator(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, ranges: Ranges, causal_captions: bool, cuda_cpp: bool = False
) -> Tensor:
    tile_size = _tiling(q_THK).tile
    plan = plan_tiles(ranges, tile_size, q_THK.device)
    q_THK, k_THK, v_THK = q_THK.contiguous(), k_THK.contiguous(), v_THK.contiguous()
    y_THK, _ = torch.ops.beit3_ds.packed_attention(q_THK, k_THK, v_THK, *plan, tile_size, causal_captions, cuda_cpp)
    return y_THK


def check_kernels(device: torch.device, dtype: torch.dtype, head_size: int, cuda_cpp: bool = False) -> None:
    """Compares the kernels with the reference, forward and backward, on a pair of 149 rows and two short sequences.

    Args:
        device: device of the kernels.
        dtype: dtype of queries, keys and values.
        head_size: columns of a head, K.
        cuda_cpp: whether the forward kernel is the one in CUDA C++.

    Raises:
        WrongResultError: if a result is wrong.
    """
    ranges = (((0, 120), (121, 150)), ((120, 121),), ((150, 169),))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 169, 2, head_size, generator=generator).to(device, dtype).unbind()
    for captions in (False, True):
        ours, reference = (
            with_gradients(partial(attention, ranges=ranges, causal_captions=captions))
            for attention in (partial(_run_operator, cuda_cpp=cuda_cpp), packed_attention_reference)
        )
        check_against_reference(("y", "dq", "dk", "dv"), ours(*inputs), reference, inputs)


KERNELS = TrustedKernels("packed_attention", check_kernels)
"""Decides whether both operators use their GPU kernels, by a check at the first use on a device."""


def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """Runs one scaled_dot_product_attention per bucket and returns the outputs in the order of the stream's rows."""
    if q_THK.device.type == "cpu":
        return _AttendOnCPU.apply(q_THK, k_THK, v_THK, plan.buckets)
    outputs = [_attend_bucket(q_THK, k_THK, v_THK, bucket) for bucket in plan.buckets]
    if not outputs:
        return q_THK + k_THK + v_THK  # no rows, but every projection must stay in the graph
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return y if plan.output_rows is None else y.index_select(0, plan.output_rows)


def _attend_bucket(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, bucket: Bucket) -> Tensor:
    take = _row_reader(bucket)
    y_nHSK = F.scaled_dot_product_attention(take(q_THK), take(k_THK), take(v_THK), attn_mask=bucket.key_mask)
    return y_nHSK.transpose(1, 2).flatten(0, 1)


class _AttendOnCPU(torch.autograd.Function):
    """Runs PyTorch's attention operator for CPUs on every bucket, and saves packed rows only.

    Autograd would save gathered and padded copies. This backward pass gathers packed rows again instead, and writes
    every gradient once.
    """

    @staticmethod
    def forward(ctx: Any, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, buckets: tuple[Bucket, ...]) -> Tensor:
        y_THK = ALLOCATOR.empty_like(q_THK)
        lses = []
        for bucket in buckets:
            take = _row_reader(bucket)
            y_nHSK, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                take(q_THK), take(k_THK), take(v_THK), attn_mask=_additive_mask(bucket, q_THK.dtype)
            )
            _write_rows(y_THK, y_nHSK, bucket)
            lses.append(ALLOCATOR.settle(lse))
        ctx.buckets = buckets
        ctx.save_for_backward(q_THK, k_THK, v_THK, y_THK, *lses)
        return y_THK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_THK: Tensor) -> tuple[Tensor | None, ...]:
        q_THK, k_THK, v_THK, y_THK, *lses = ctx.saved_tensors
        gradients = [ALLOCATOR.empty_like(x_THK) for x_THK in (q_THK, k_THK, v_THK)]
        for bucket, lse in zip(ctx.buckets, lses, strict=True):
            take = _row_reader(bucket)
            dy_nHSK = take(dy_THK)
            if bucket.real is not None:  # rows repeated as padding must not count twice
                is_real = torch.zeros_like(bucket.rows, dtype=torch.bool).index_fill_(0, bucket.real, True)
                dy_nHSK.mul_(is_real.view(bucket.num_sequences, 1, -1, 1))  # in place, because dy_nHSK is a copy
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy_nHSK,
                *(take(x_THK) for x_THK in (q_THK, k_THK, v_THK, y_THK)),
                lse,
                dropout_p=0.0,
                is_causal=False,
                attn_mask=_additive_mask(bucket, q_THK.dtype),
            )
            for gradient_THK, part_nHSK in zip(gradients, parts, strict=True):
                _write_rows(gradient_THK, part_nHSK, bucket)
        return (*gradients, None)


def _additive_mask(bucket: Bucket, dtype: torch.dtype) -> Tensor | None:
    """Returns a mask that is 0 where a query sees a key and -inf elsewhere; None if every query sees all keys."""
    if bucket.key_mask is None:
        return None
    return torch.zeros_like(bucket.key_mask, dtype=dtype).masked_fill_(~bucket.key_mask, -torch.inf)


def _write_rows(out_THK: Tensor, x_nHSK: Tensor, bucket: Bucket) -> None:
    """Writes a bucket's rows to their places in the stream."""
    rows, x_rHK = bucket.rows, x_nHSK.transpose(1, 2).flatten(0, 1)
    if bucket.first_row is not None:
        out_THK[bucket.first_row : bucket.first_row + len(rows)] = x_rHK
    elif bucket.real is None:
        out_THK.index_copy_(0, rows, x_rHK)
    else:
        out_THK.index_copy_(0, rows[bucket.real], _select_rows(x_rHK, bucket.real))


def _row_reader(bucket: Bucket) -> Callable[[Tensor], Tensor]:
    def take(x_THK: Tensor) -> Tensor:
        if bucket.first_row is None:
            rows = _select_rows(x_THK, bucket.rows)
        else:
            rows = x_THK[bucket.first_row : bucket.first_row + len(bucket.rows)]
        return rows.unflatten(0, (bucket.num_sequences, -1)).transpose(1, 2)

    return take


def _select_rows(x_THK: Tensor, rows: Tensor) -> Tensor:
    if x_THK.device.type != "cpu":  # differentiated by autograd
        return x_THK.index_select(0, rows)
    return torch.index_select(x_THK, 0, rows, out=ALLOCATOR.empty(x_THK, len(rows), *x_THK.shape[1:]))


def _tiling(q_THK: Tensor) -> "AttentionTiling":
    from beit3_ds.kernels.triton.architecture import architecture_of  # Triton is needed on a GPU only
    from beit3_ds.kernels.triton.packed_attention_launch import choose_tiling

    return choose_tiling(architecture_of(q_THK.device), q_THK.shape[-1], q_THK.dtype)


_LIBRARY = torch.library.Library("beit3_ds", "FRAGMENT")
_LIBRARY.define(
    "packed_attention(Tensor q, Tensor k, Tensor v, Tensor sequences, Tensor tiles, int tile_size, "
    "bool causal_captions, bool cuda_cpp=False) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "packed_attention_backward(Tensor dy, Tensor q, Tensor k, Tensor v, Tensor y, Tensor lse, Tensor sequences, "
    "Tensor tiles, int tile_size, bool causal_captions) -> (Tensor, Tensor, Tensor)"
)


@torch.library.impl(_LIBRARY, "packed_attention", "CPU")
def _forward_cpu(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tile_size: int,
    causal: bool,
    cuda_cpp: bool = False,
) -> tuple[Tensor, Tensor]:
    """Implements the operator on a CPU for checks, sequence by sequence; the model never calls it there."""
    y_THK = torch.empty_like(q_THK)
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=_accumulator(q_THK))
    for rows, seen in _sequences(sequences_Q4, causal):
        q_HSK, k_HSK, v_HSK = (x[rows].transpose(0, 1).to(lse_HT.dtype) for x in (q_THK, k_THK, v_THK))
        scores_HSS = (q_HSK @ k_HSK.mT * q_HSK.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf)
        lse_HT[:, rows] = scores_HSS.logsumexp(-1)
        y_THK[rows] = (scores_HSS.softmax(-1) @ v_HSK).transpose(0, 1).to(y_THK.dtype)
    return y_THK, lse_HT


@torch.library.impl(_LIBRARY, "packed_attention_backward", "CPU")
def _backward_cpu(
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


@torch.library.impl(_LIBRARY, "packed_attention", "CUDA")
def _forward_cuda(
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    sequences_Q4: Tensor,
    tiles_N2: Tensor,
    tile_size: int,
    causal: bool,
    cuda_cpp: bool = False,
) -> tuple[Tensor, Tensor]:
    if cuda_cpp:
        return cuda_kernels.packed_attention_forward(q_THK, k_THK, v_THK, sequences_Q4, tiles_N2, tile_size, causal)
    from beit3_ds.kernels.triton.packed_attention_launch import forward

    tiling = _tiling(q_THK)._replace(tile=tile_size)
    return forward(q_THK, k_THK, v_THK, sequences_Q4, tiles_N2, tiling, causal)


@torch.library.impl(_LIBRARY, "packed_attention_backward", "CUDA")
def _backward_cuda(
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
    from beit3_ds.kernels.triton.packed_attention_launch import backward

    tensors = (dy_THK, q_THK, k_THK, v_THK, y_THK, lse_HT, sequences_Q4, tiles_N2)
    return backward(*tensors, _tiling(q_THK)._replace(tile=tile_size), causal)


@torch.library.register_fake("beit3_ds::packed_attention", lib=_LIBRARY)
def _forward_fake(q_THK: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    lse_HT = q_THK.new_empty(q_THK.shape[1], q_THK.shape[0], dtype=_accumulator(q_THK))
    return torch.empty_like(q_THK), lse_HT


@torch.library.register_fake("beit3_ds::packed_attention_backward", lib=_LIBRARY)
def _backward_fake(dy_THK: Tensor, q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(q_THK), torch.empty_like(k_THK), torch.empty_like(v_THK)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.tile_size, ctx.causal_captions, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx: Any, dy_THK: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q_THK, k_THK, v_THK, sequences_Q4, tiles_N2, y_THK, lse_HT = ctx.saved_tensors
    tensors = (dy_THK.contiguous(), q_THK, k_THK, v_THK, y_THK, lse_HT, sequences_Q4, tiles_N2)
    gradients = torch.ops.beit3_ds.packed_attention_backward(*tensors, ctx.tile_size, ctx.causal_captions)
    return (*gradients, None, None, None, None, None)


torch.library.register_autograd("beit3_ds::packed_attention", _differentiate, setup_context=_save, lib=_LIBRARY)


def _sequences(sequences_Q4: Tensor, causal_captions: bool) -> list[tuple[Tensor, Tensor]]:
    """Returns each sequence's row numbers, (S,) int64, and its mask, (S, S) bool: True where a query sees a key."""
    result = []
    for start_1, length_1, start_2, length_2 in sequences_Q4.tolist():
        rows = torch.cat([torch.arange(start_1, start_1 + length_1), torch.arange(start_2, start_2 + length_2)])
        result.append((rows, visible_rows(len(rows), length_1 if causal_captions else len(rows), rows.device)))
    return result


def _accumulator(x: Tensor) -> torch.dtype:
    """Returns float32 for half precision, otherwise the dtype of `x`."""
    return torch.promote_types(x.dtype, torch.float32)
