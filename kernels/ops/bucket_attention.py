"""Computes packed attention with PyTorch's attention: one call per bucket of sequences with similar lengths."""

# T packed rows, H heads, K head width; a bucket holds n sequences of at most S rows.

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.attention_plan import AttentionPlan, Bucket
from beit3_ds.kernels.ops.differentiation import once_differentiable


def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, plan: AttentionPlan) -> Tensor:
    """Computes attention with one call of scaled_dot_product_attention per bucket; returns rows in packed order."""
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
    """Computes attention on a CPU, one bucket at a time. Saves no gathered copies of rows for the backward pass.

    Autograd would save gathered and padded copies of the rows. This class saves the packed rows and the log-sum-exps.
    Its backward pass gathers the packed rows again, and writes each gradient once.
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
    """Returns a bucket's mask for addition to the scores: 0 where a query sees a key, -inf elsewhere.

    Returns None if all queries see all keys.
    """
    if bucket.key_mask is None:
        return None
    return torch.zeros_like(bucket.key_mask, dtype=dtype).masked_fill_(~bucket.key_mask, -torch.inf)


def _write_rows(out_THK: Tensor, x_nHSK: Tensor, bucket: Bucket) -> None:
    """Writes a bucket's rows `x_nHSK` into `out_THK`, at the positions of these rows in the packed order."""
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
