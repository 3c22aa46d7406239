# mypy: disable-error-code="no-untyped-def"
"""Defines the Triton kernels of the cross entropy: one updates partial results, one computes gradients."""

# M rows, N logits of a row (`width`), G groups of rows.
#
# The kernels get logits without their bias, and add the bias. The row stride of the logits and the length of the bias
# are `steps` x 64 elements. So the compiler knows that rows are aligned, and every access is 128 bits wide. Logits from
# column N on are undefined and count as minus infinity.

import math

import triton
import triton.language as tl

from beit3_ds.kernels.ops.vocabulary_tiles import ALIGNMENT

LOG2E = tl.constexpr(math.log2(math.e))
STEP = tl.constexpr(ALIGNMENT)


@triton.jit(do_not_specialize=["num_rows", "width", "steps", "first"])
def partials_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    partials_ptr,
    num_rows,
    width,
    steps,
    first,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Updates the partial results of one row with the row's logits in one vocabulary tile.

    The partial results of M rows are (3, M): each row's largest logit, the sum of exp(logit - largest), and the
    target's logit.
    """
    row = tl.program_id(0)
    stride = steps * STEP
    known = tl.load(partials_ptr + row)
    largest = known
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, width, BLOCK, num_stages=STAGES):
        columns = begin + tl.arange(0, BLOCK)
        there = columns < stride
        logits = tl.load(logits_ptr + row * stride + columns, mask=there, other=0.0).to(tl.float32)
        logits += tl.load(bias_ptr + columns, mask=there, other=0.0).to(tl.float32)
        logits = tl.where(columns < width, logits, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(logits, 0))
        sums = sums * tl.exp2((largest - new_largest) * LOG2E) + tl.exp2((logits - new_largest) * LOG2E)
        largest = new_largest
    total = tl.load(partials_ptr + num_rows + row) * tl.exp2((known - largest) * LOG2E) + tl.sum(sums, 0)
    tl.store(partials_ptr + row, largest)
    tl.store(partials_ptr + num_rows + row, total)
    target = tl.load(target_ptr + row) - first
    if (target >= 0) & (target < width):  # if not, the target is in another vocabulary tile or on another rank
        logit = tl.load(logits_ptr + row * stride + target).to(tl.float32) + tl.load(bias_ptr + target).to(tl.float32)
        tl.store(partials_ptr + 2 * num_rows + row, logit)


@triton.jit(do_not_specialize=["num_rows", "rows", "width", "steps", "first"])
def gradient_kernel(
    logits_ptr,
    bias_ptr,
    target_ptr,
    lse_ptr,
    d_loss_ptr,
    partial_sum_ptr,
    num_rows,
    rows,
    width,
    steps,
    first,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Overwrites logits with their gradients, for one group of rows and BLOCK columns.

    Also writes the sum of the gradients over the group's rows, into a tensor with one row per group.
    """
    group = tl.program_id(1)
    stride = steps * STEP
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = columns < stride
    bias = tl.load(bias_ptr + columns, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    stop = tl.minimum((group + 1) * rows, num_rows)
    for begin in tl.range(group * rows, stop, ROWS, num_stages=STAGES):
        numbers = begin + tl.arange(0, ROWS)
        real = numbers < stop
        offsets = numbers[:, None] * stride + columns[None, :]
        mask = real[:, None] & there[None, :]
        logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        lse = tl.load(lse_ptr + numbers, mask=real, other=float("inf"))  # so that p = 0 in missing rows
        d_loss = tl.load(d_loss_ptr + numbers, mask=real, other=0.0)
        target = tl.load(target_ptr + numbers, mask=real, other=-1) - first
        p = tl.exp2((logits - lse[:, None]) * LOG2E)
        d = tl.where(columns[None, :] == target[:, None], p - 1.0, p) * d_loss[:, None]
        tl.store(logits_ptr + offsets, d.to(logits_ptr.dtype.element_ty), mask=mask)
        total += d
    tl.store(partial_sum_ptr + group * stride + columns, tl.sum(total, 0), mask=there)
