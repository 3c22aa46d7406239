"""Fuses a linear layer with the cross entropy over a large vocabulary.

The logits are computed in tiles of vocabulary columns, so that not all logits must be in memory at once. The matrix
products are PyTorch's. On a GPU, the operators `logits_partials` and `logits_gradient` process the logits, with kernels
from `triton/linear_cross_entropy.py`. On a CPU, PyTorch's element-wise operations process them.
"""

# M rows, D width, V vocabulary, N columns of a vocabulary tile, B tiles; K buffers of M x S elements, where S is the
# stride, the number of elements from one row of a buffer to the next.

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.cpu.allocator import ALLOCATOR
from beit3_ds.kernels.ops.differentiation import once_differentiable
from beit3_ds.kernels.ops.label_smoothing import LabelSmoothing, add_smoothing_gradients, sum_logits
from beit3_ds.kernels.ops.measured_op import MeasuredOp
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.self_check import TrustedKernels
from beit3_ds.kernels.ops.vocabulary_tiles import VocabularyTiles, divide_for_cpu, divide_for_gpu


def linear_cross_entropy_reference(h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor) -> Tensor:
    """Computes the loss of `linear_cross_entropy` in plain PyTorch, with all logits in memory."""
    return F.cross_entropy(F.linear(h_MD, w_VD, b_V).to(_loss_dtype(h_MD)), target_M, reduction="none")


class Partials(NamedTuple):
    """Holds what one shard of the vocabulary contributes to the cross entropy of each row.

    All tensors are (M,) for M rows, in float32, or in float64 if the rows are float64. To combine shards, compute the
    maximum of `largest` over the shards. Multiply each shard's `total` by exp(largest - maximum), and add the products
    over the shards. Add `target_logit` over the shards, and do the same with `logit_sum`. With the combined values, the
    cross entropy is log(total) + maximum - target_logit. Only label smoothing uses `logit_sum`.
    """

    largest: Tensor
    """Largest logit of each row in this shard."""
    total: Tensor
    """Sum of exp(logit - largest) over each row's logits in this shard."""
    target_logit: Tensor
    """Logit of each row's target; 0 if the target is in another shard."""
    logit_sum: Tensor | None = None
    """Sum of each row's logits in this shard; None without label smoothing."""


def linear_cross_entropy(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    chunk_size: int | None,
    reduce: Callable[[Partials], Partials] | None = None,
    smoothing: LabelSmoothing | None = None,
) -> Tensor:
    """Computes each row's cross entropy with its target, or each row's divergence from smoothed labels.

    Without a chunk size, the logits of all M rows over all V vocabulary entries are saved. With a chunk size, at most
    `chunk_size` x V logits are saved for the backward pass, which recomputes all others. On a GPU, gradients overwrite
    the saved logits, so a graph supports only one backward pass.

    On a CPU, logits are float32, or float64 if h is float64. On a GPU, logits have h's dtype.

    Args:
        h_MD: rows. If M is 0, all gradients are zero.
        w_VD: output matrix, which is saved for the backward pass without a copy.
        b_V: output bias.
        target_M: vocabulary index of each row's target, int64 in [0, V). With a sharded vocabulary, indices are
            relative to this shard, and an index outside [0, V) belongs to another shard.
        chunk_size: limit on memory: at most `chunk_size` x V logits exist at once; None for no limit.
        reduce: function that combines this shard's partials with those of the other shards; None if the vocabulary is
            not sharded. With a sharded vocabulary, this op computes only this shard's part of h's gradient.
        smoothing: smoothed labels (`label_smoothing`); None for the cross entropy.

    Returns:
        Loss of each row, (M,) float32, or float64 if h is float64.
    """
    target_M = target_M.contiguous()
    return _LinearCrossEntropy.apply(h_MD, w_VD, b_V, target_M, chunk_size, reduce, KERNELS.accept(h_MD), smoothing)


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Compares the Triton kernels with the reference, forward and backward, for one and for several vocabulary tiles.

    Raises:
        WrongResultError: if a result is wrong.
    """
    generator = torch.Generator().manual_seed(0)
    h_MD, w_VD, b_V, d_loss_M = (
        torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((40, 64), (5003, 64), (5003,), (40,))
    )
    target_M = torch.randint(0, 5003, (40,), generator=generator).to(device)
    reference = with_gradients(partial(linear_cross_entropy_reference, target_M=target_M))
    for chunk_size in (None, 16):

        def operator(*leaves: Tensor, chunk_size: int | None = chunk_size) -> Tensor:
            loss_M: Tensor = _LinearCrossEntropy.apply(*leaves, target_M, chunk_size, None, True)
            return loss_M

        inputs = (h_MD, w_VD * 0.125, b_V, d_loss_M)
        check_against_reference(("loss", "dh", "dw", "db"), with_gradients(operator)(*inputs), reference, inputs)


KERNELS = TrustedKernels("linear_cross_entropy", check_kernels)
"""Decides whether `linear_cross_entropy` may use its Triton kernels. A check at the first use on a device must pass."""


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_MD: Tensor,
        w_VD: Tensor,
        b_V: Tensor,
        target_M: Tensor,
        chunk_size: int | None,
        reduce: Callable[[Partials], Partials] | None,
        kernels: bool,
        smoothing: LabelSmoothing | None = None,
    ) -> Tensor:
        divide, forward = (divide_for_gpu, _forward_kernels) if kernels else (divide_for_cpu, forward_plain)
        tiles = divide(len(h_MD), len(w_VD), chunk_size)
        own, *kept = forward(h_MD, w_VD, b_V, target_M, tiles)
        if smoothing is not None:
            own = own._replace(logit_sum=sum_logits(h_MD, w_VD, b_V, smoothing, own.largest.dtype))
        joined = own if reduce is None else reduce(own)
        lse_M = joined.largest + joined.total.log()
        # Saves the parameters, not views or casts of them: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(h_MD, w_VD, b_V, target_M, lse_M, *kept)
        ctx.tiles, ctx.kernels, ctx.smoothing = tiles, kernels, smoothing
        loss_M = lse_M - joined.target_logit
        if smoothing is None or joined.logit_sum is None:
            return loss_M
        excess_M = smoothing.vocab_size * joined.target_logit - joined.logit_sum
        return loss_M + smoothing.share * excess_M + smoothing.constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss_M: Tensor) -> tuple[Tensor | None, ...]:
        backward: Callable[..., tuple[Tensor, ...]] = _backward_kernels if ctx.kernels else backward_plain
        dh_MD, dw_VD, db_V = backward(*ctx.saved_tensors, d_loss_M, ctx.tiles)
        if ctx.smoothing is not None:
            add_smoothing_gradients((dh_MD, dw_VD, db_V), ctx.saved_tensors[:4], d_loss_M, ctx.smoothing)
        return dh_MD, dw_VD, db_V, None, None, None, None, None


def forward_plain(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, tiles: VocabularyTiles
) -> tuple[Partials, Tensor, Tensor]:
    """Computes the partial results of one vocabulary shard in plain PyTorch.

    Args:
        h_MD: rows.
        w_VD: this shard's rows of the output matrix.
        b_V: this shard's bias.
        target_M: index of each row's target in this shard. If an index is outside the shard, the row's target logit is
            0.
        tiles: vocabulary tiles of this shard.

    Returns:
        The partials of the M rows, then two tensors for the backward pass. They depend on `largest`: for each tile and
        row, the largest logit in this tile and all earlier tiles. The first tensor, (`tiles.num_buffers`, M,
        `tiles.stride`), holds exp(logit - largest) for one tile per buffer: the last tile that used the buffer
        (`VocabularyTiles.is_kept`). The second tensor, (tiles, M), holds `largest`.
    """
    dtype = _loss_dtype(h_MD)
    partials_3M = _no_partials(h_MD)
    kept_KMS = ALLOCATOR.empty(h_MD, tiles.num_buffers, len(h_MD), tiles.stride, dtype=dtype)
    largest_BM = ALLOCATOR.empty(h_MD, len(tiles.columns), len(h_MD), dtype=dtype)
    for index, columns in enumerate(tiles.columns):
        logits_MN = kept_KMS[tiles.buffer(index), :, : columns.stop - columns.start]
        _fill_logits(logits_MN, h_MD, w_VD[columns], b_V[columns])
        _update_partials(logits_MN, target_M, columns.start, partials_3M)
        largest_BM[index] = partials_3M[0]
    return Partials(*partials_3M.unbind()), kept_KMS, largest_BM


def backward_plain(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    lse_M: Tensor,
    kept_KMS: Tensor,
    largest_BM: Tensor,
    d_loss_M: Tensor,
    tiles: VocabularyTiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of the rows, and of one shard's matrix and bias, in plain PyTorch.

    Args:
        h_MD: see `forward_plain`, also for w_VD, b_V, target_M and tiles.
        lse_M: log(sum exp(logits)) of each row over the whole vocabulary, float32, or float64 if h is float64.
        kept_KMS: buffers that `forward_plain` returned; not changed.
        largest_BM: largest logits that `forward_plain` returned; not changed.
        d_loss_M: gradient of each row's loss, in the dtype of lse_M.

    Returns:
        dh_MD, dw_VD and db_V. dh_MD is this shard's part of a sum over shards.
    """
    dh_MD = torch.zeros_like(h_MD, dtype=lse_M.dtype)  # in half precision the sum would be rounded once per tile
    dw_VD, db_V = ALLOCATOR.empty_like(w_VD, lasting=True), ALLOCATOR.empty_like(b_V, lasting=True)
    work_MS = ALLOCATOR.empty_like(kept_KMS[0])
    for index, columns in enumerate(tiles.columns):
        d_MN = work_MS[:, : columns.stop - columns.start]
        if tiles.is_kept(index):
            scale_M = (largest_BM[index] - lse_M).exp_().mul_(d_loss_M)
            torch.mul(kept_KMS[tiles.buffer(index), :, : d_MN.shape[1]], scale_M.unsqueeze(1), out=d_MN)
        else:
            _fill_logits(d_MN, h_MD, w_VD[columns], b_V[columns])
            d_MN.sub_(lse_M.unsqueeze(1)).exp_().mul_(d_loss_M.unsqueeze(1))
        index_M1, inside_M = _find(target_M, columns.start, d_MN)
        d_MN.scatter_add_(1, index_M1, (-d_loss_M * inside_M).unsqueeze(1))
        torch.mm(d_MN.to(h_MD.dtype).t(), h_MD, out=dw_VD[columns])
        dh_MD.addmm_(d_MN, w_VD[columns].to(d_MN.dtype))
        db_V[columns] = d_MN.sum(0)
    return dh_MD.to(h_MD.dtype), dw_VD, db_V


def _forward_kernels(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, tiles: VocabularyTiles
) -> tuple[Partials, Tensor]:
    """Computes the partials with GPU kernels; also returns a buffer with the last tile's logits, without bias."""
    partials_3M = _no_partials(h_MD)
    kept_MS = h_MD.new_empty(len(h_MD), tiles.stride)
    for columns in tiles.columns:
        logits_MN = kept_MS[:, : columns.stop - columns.start]
        torch.mm(h_MD, w_VD[columns].t(), out=logits_MN)
        _PARTIALS(logits_MN, b_V[columns], target_M, columns.start, partials_3M)
    return Partials(*partials_3M.unbind()), kept_MS


def _backward_kernels(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    lse_M: Tensor,
    kept_MS: Tensor,
    d_loss_M: Tensor,
    tiles: VocabularyTiles,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes dh, dw and db with GPU kernels. Overwrites `kept_MS`, the buffer with saved logits."""
    dh_MD = torch.zeros_like(h_MD, dtype=lse_M.dtype)  # in half precision the sum would be rounded once per tile
    dw_VD, db_V = torch.empty_like(w_VD), torch.empty_like(b_V)
    d_loss_M = d_loss_M.contiguous()
    for index, columns in reversed(list(enumerate(tiles.columns))):  # the last tile's logits are saved
        d_MN = kept_MS[:, : columns.stop - columns.start]
        if not tiles.is_kept(index):
            torch.mm(h_MD, w_VD[columns].t(), out=d_MN)
        db_V[columns] = _GRADIENT(d_MN, b_V[columns], target_M, columns.start, lse_M, d_loss_M)
        torch.mm(d_MN.t(), h_MD, out=dw_VD[columns])
        dh_MD.add_(torch.mm(d_MN, w_VD[columns]))
    return dh_MD.to(h_MD.dtype), dw_VD, db_V


def _fill_logits(logits_MN: Tensor, h_MD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
    if logits_MN.dtype == h_MD.dtype:
        torch.addmm(b_N, h_MD, w_ND.t(), out=logits_MN)
    else:
        logits_MN.copy_(F.linear(h_MD, w_ND, b_N))


def _update_partials(logits_MN: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    """Adds one tile to each row's partial results, and replaces each logit of the tile by exp(logit - largest).

    `largest` is the row's largest logit in this tile and all earlier tiles.

    Args:
        logits_MN: logits of the tile.
        target_M: vocabulary index of each row's target.
        first: vocabulary index of the tile's first column.
        partials_3M: per row the largest logit so far, the sum of exp(logit - largest), and the target's logit. The
            target's logit is 0 until its tile was added.
    """
    largest_M, total_M, target_logit_M = partials_3M.unbind()
    index_M1, inside_M = _find(target_M, first, logits_MN)
    target_logit_M.add_(logits_MN.gather(1, index_M1).squeeze(1) * inside_M)
    known_M = largest_M.clone()
    torch.maximum(largest_M, logits_MN.amax(1), out=largest_M)
    total_M.mul_((known_M - largest_M).exp_()).add_(logits_MN.sub_(largest_M.unsqueeze(1)).exp_().sum(1))


def _find(target_M: Tensor, first: int, logits_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Finds each row's target in a tile.

    Returns:
        The target's column in the tile, (rows, 1), and whether the target is in the tile, (rows,) bool. If the target
        is in another tile, the column is arbitrary.
    """
    local_M, width = target_M - first, logits_MN.shape[1]
    inside_M = (local_M >= 0) & (local_M < width)
    return local_M.clamp_(0, width - 1).unsqueeze(1), inside_M


def _no_partials(h_MD: Tensor) -> Tensor:
    partials_3M = h_MD.new_zeros(3, len(h_MD), dtype=_loss_dtype(h_MD))
    partials_3M[0] = -torch.inf
    return partials_3M


def _partials_library(logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    """Computes the results of `partials_kernel` in plain PyTorch.

    This function is the operator's `library` implementation on a GPU, and the reference for tests of the kernel.
    """
    _update_partials(logits_MN.to(partials_3M.dtype) + bias_N, target_M, first, partials_3M)


def _gradient_library(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, lse_M: Tensor, d_loss_M: Tensor
) -> Tensor:
    """Computes the results of `gradient_kernel` in plain PyTorch.

    Overwrites the logits with gradients, and returns the sum of the gradients over rows. This function is the
    operator's `library` implementation on a GPU, and the reference for tests of the kernel.
    """
    d_MN = (logits_MN.to(lse_M.dtype) + bias_N).sub_(lse_M.unsqueeze(1)).exp_()
    index_M1, inside_M = _find(target_M, first, d_MN)
    d_MN.scatter_add_(1, index_M1, -inside_M.to(d_MN.dtype).unsqueeze(1)).mul_(d_loss_M.unsqueeze(1))
    logits_MN.copy_(d_MN)
    return d_MN.sum(0)


def _partials_triton(logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    from beit3_ds.kernels.triton.linear_cross_entropy_launch import choose_tiling, partials  # needed on a GPU only

    partials(logits_MN, bias_N, target_M, first, partials_3M, choose_tiling(logits_MN.dtype))


def _gradient_triton(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, lse_M: Tensor, d_loss_M: Tensor
) -> Tensor:
    from beit3_ds.kernels.triton.linear_cross_entropy_launch import choose_tiling, gradient

    return gradient(logits_MN, bias_N, target_M, first, lse_M, d_loss_M, choose_tiling(logits_MN.dtype))


_PARTIALS = MeasuredOp(
    "logits_partials",
    {"triton": _partials_triton, "library": _partials_library},
    on_cpu=_partials_library,
    mutates=(4,),
    ignores=(3,),
)
_GRADIENT = MeasuredOp(
    "logits_gradient",
    {"triton": _gradient_triton, "library": _gradient_library},
    on_cpu=_gradient_library,
    mutates=(0,),
    ignores=(3,),
)


def _loss_dtype(h_MD: Tensor) -> torch.dtype:
    """Returns the dtype of losses and sums: float32 if `h` is in half precision, otherwise the dtype of `h`."""
    return torch.promote_types(h_MD.dtype, torch.float32)
