"""Linear layer and cross entropy over a large vocabulary, in blocks of the vocabulary so that full logits never exist.

On the CPU it is PyTorch's products and passes. On a GPU it is PyTorch's products, and between them the operators
`beit3_ds::logits_partials` and `beit3_ds::logits_gradient` with the kernels of `linear_cross_entropy_triton`, which
were compiled ahead of time and interpreted, but never run on a GPU.
"""

# M rows, D width, V vocabulary, N columns of a block of it, B blocks; K buffers of M x S elements.

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from beit3_ds.kernels.cpu.host_memory import empty, empty_like
from beit3_ds.kernels.ops.numerics import check_rule, with_gradients
from beit3_ds.kernels.ops.self_check import passes
from beit3_ds.kernels.ops.vocabulary_blocks import VocabularyBlocks, divide_for_cpu, divide_for_gpu


def linear_cross_entropy_reference(h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, in plain PyTorch with full logits."""
    return F.cross_entropy(F.linear(h_MD, w_VD, b_V).to(_loss_dtype(h_MD)), target_M, reduction="none")


class Partials(NamedTuple):
    """What one shard of the vocabulary knows of every row's cross entropy, (M,) float32 each.

    The loss is log(total) + largest - target_logit once shards are reduced: the largest of all, the totals rescaled to
    it and summed, the target's logits summed.
    """

    largest: Tensor
    """The largest logit."""
    total: Tensor
    """Sum of exp(logit - largest)."""
    target_logit: Tensor
    """The target's logit; 0 if the target lies in another shard."""


def linear_cross_entropy(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    chunk_size: int | None,
    reduce: Callable[[Partials], Partials] | None = None,
) -> Tensor:
    """Cross entropy of every row against its target.

    With a chunk size, at most `chunk_size` x V logits exist at a time, in float32 (float64 for float64 input; on a GPU
    in h's dtype). Those that fit are kept for the backward pass, which recomputes the others; without one, all M x V
    are kept. On a GPU a graph can be differentiated once: gradients are written over what was kept.

    Args:
        h_MD: rows; zero rows are allowed and give zero gradients.
        w_VD: output matrix, saved for the backward pass as it is.
        b_V: output bias.
        target_M: int64 in [0, V); with shards, one outside [0, V) belongs to another shard.
        chunk_size: rows whose logits over the whole vocabulary may exist at a time, or None.
        reduce: joins this shard's partials with those of the others if the vocabulary is sharded; the gradient for h is
            then this shard's part.

    Returns:
        The loss of every row, (M,) float32.
    """
    target_M = target_M.contiguous()
    return _LinearCrossEntropy.apply(h_MD, w_VD, b_V, target_M, chunk_size, reduce, runs_kernels(h_MD))


def runs_kernels(h_MD: Tensor) -> bool:
    """Whether `linear_cross_entropy` takes the GPU's kernels; float64 takes the CPU's way.

    So does everything on a device where the kernels fail their check at their first use (`self_check`).
    """
    supported = h_MD.is_cuda and h_MD.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return supported and _are_trusted(h_MD.device, h_MD.dtype)


@lru_cache
def _are_trusted(device: torch.device, dtype: torch.dtype) -> bool:
    return passes(f"linear_cross_entropy in {dtype}", device, lambda: check_kernels(device, dtype))


def check_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Holds the operators to the reference, forward and backward, with one block of the vocabulary and with several.

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
        check_rule(("loss", "dh", "dw", "db"), with_gradients(operator)(*inputs), reference, inputs)


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
    ) -> Tensor:
        divide, forward = (divide_for_gpu, _forward_kernels) if kernels else (divide_for_cpu, forward_plain)
        blocks = divide(len(h_MD), len(w_VD), chunk_size)
        own, *kept = forward(h_MD, w_VD, b_V, target_M, blocks)
        joined = own if reduce is None else reduce(own)
        lse_M = joined.largest + joined.total.log()
        # The parameters themselves, not views or casts: ZeRO-3 swaps their storage between forward and backward.
        ctx.save_for_backward(h_MD, w_VD, b_V, target_M, lse_M, *kept)
        ctx.blocks, ctx.kernels = blocks, kernels
        return lse_M - joined.target_logit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss_M: Tensor) -> tuple[Tensor | None, ...]:
        backward: Callable[..., tuple[Tensor, ...]] = _backward_kernels if ctx.kernels else backward_plain
        return (*backward(*ctx.saved_tensors, d_loss_M, ctx.blocks), None, None, None, None)


def forward_plain(
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, blocks: VocabularyBlocks
) -> tuple[Partials, Tensor, Tensor]:
    """One shard's partials, by PyTorch alone.

    Args:
        h_MD: rows.
        w_VD: this shard's rows of the output matrix.
        b_V: this shard's bias.
        target_M: index into this shard; a row whose target lies outside it ([0, V)) contributes 0 as target logit.
        blocks: of this shard.

    Returns:
        The partials. For the backward pass: exp(logit - largest) in the buffers, (K, M, S), and for every block what
        was the largest logit of a row when it was made, (B, M).
    """
    dtype = _loss_dtype(h_MD)
    partials_3M = _no_partials(h_MD)
    kept_KMS = empty(h_MD, blocks.num_buffers, len(h_MD), blocks.stride, dtype=dtype)
    largest_BM = empty(h_MD, len(blocks.columns), len(h_MD), dtype=dtype)
    for index, columns in enumerate(blocks.columns):
        logits_MN = kept_KMS[blocks.buffer(index), :, : columns.stop - columns.start]
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
    blocks: VocabularyBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for rows, matrix and bias.

    Args:
        h_MD: as in `forward_plain`, like the matrix, the bias, the targets and the blocks.
        lse_M: log(sum exp(logits)) of every row over the whole vocabulary, float32.
        kept_KMS: what `forward_plain` returned; left as it is, like `largest_BM`.
        d_loss_M: gradient of every row's loss, float32.

    Returns:
        dh_MD (partial if w is a shard of the vocabulary), dw_VD and db_V.
    """
    dh_MD = torch.zeros_like(h_MD, dtype=lse_M.dtype)  # half precision would round the sum once a block
    dw_VD, db_V = empty_like(w_VD, lasting=True), empty_like(b_V, lasting=True)
    work_MS = empty_like(kept_KMS[0])
    for index, columns in enumerate(blocks.columns):
        d_MN = work_MS[:, : columns.stop - columns.start]
        if blocks.is_kept(index):
            scale_M = (largest_BM[index] - lse_M).exp_().mul_(d_loss_M)
            torch.mul(kept_KMS[blocks.buffer(index), :, : d_MN.shape[1]], scale_M.unsqueeze(1), out=d_MN)
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
    h_MD: Tensor, w_VD: Tensor, b_V: Tensor, target_M: Tensor, blocks: VocabularyBlocks
) -> tuple[Partials, Tensor]:
    """As `forward_plain`; of the last block keeps the logits without their bias, (M, S)."""
    partials_3M = _no_partials(h_MD)
    kept_MS = h_MD.new_empty(len(h_MD), blocks.stride)
    for columns in blocks.columns:
        logits_MN = kept_MS[:, : columns.stop - columns.start]
        torch.mm(h_MD, w_VD[columns].t(), out=logits_MN)
        torch.ops.beit3_ds.logits_partials(logits_MN, b_V[columns], target_M, columns.start, partials_3M)
    return Partials(*partials_3M.unbind()), kept_MS


def _backward_kernels(
    h_MD: Tensor,
    w_VD: Tensor,
    b_V: Tensor,
    target_M: Tensor,
    lse_M: Tensor,
    kept_MS: Tensor,
    d_loss_M: Tensor,
    blocks: VocabularyBlocks,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `backward_plain`; overwrites what was kept."""
    dh_MD = torch.zeros_like(h_MD, dtype=lse_M.dtype)  # half precision would round the sum once a block
    dw_VD, db_V = torch.empty_like(w_VD), torch.empty_like(b_V)
    d_loss_M = d_loss_M.contiguous()
    for index, columns in reversed(list(enumerate(blocks.columns))):  # the last block's logits are still there
        d_MN = kept_MS[:, : columns.stop - columns.start]
        if not blocks.is_kept(index):
            torch.mm(h_MD, w_VD[columns].t(), out=d_MN)
        gradient_of = torch.ops.beit3_ds.logits_gradient
        db_V[columns] = gradient_of(d_MN, b_V[columns], target_M, columns.start, lse_M, d_loss_M)
        torch.mm(d_MN.t(), h_MD, out=dw_VD[columns])
        dh_MD.add_(torch.mm(d_MN, w_VD[columns]))
    return dh_MD.to(h_MD.dtype), dw_VD, db_V


def _fill_logits(logits_MN: Tensor, h_MD: Tensor, w_ND: Tensor, b_N: Tensor) -> None:
    if logits_MN.dtype == h_MD.dtype:
        torch.addmm(b_N, h_MD, w_ND.t(), out=logits_MN)
    else:
        logits_MN.copy_(F.linear(h_MD, w_ND, b_N))


def _update_partials(logits_MN: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    """Adds a block to the partials; of its logits it makes exp(logit - largest)."""
    largest_M, total_M, target_logit_M = partials_3M.unbind()
    index_M1, inside_M = _find(target_M, first, logits_MN)
    target_logit_M.add_(logits_MN.gather(1, index_M1).squeeze(1) * inside_M)
    known_M = largest_M.clone()
    torch.maximum(largest_M, logits_MN.amax(1), out=largest_M)
    total_M.mul_((known_M - largest_M).exp_()).add_(logits_MN.sub_(largest_M.unsqueeze(1)).exp_().sum(1))


def _find(target_M: Tensor, first: int, logits_MN: Tensor) -> tuple[Tensor, Tensor]:
    """Column of every row's target, (M, 1), any where it is in another block, and whether it is in this one."""
    local_M, width = target_M - first, logits_MN.shape[1]
    inside_M = (local_M >= 0) & (local_M < width)
    return local_M.clamp_(0, width - 1).unsqueeze(1), inside_M


def _no_partials(h_MD: Tensor) -> Tensor:
    partials_3M = h_MD.new_zeros(3, len(h_MD), dtype=_loss_dtype(h_MD))
    partials_3M[0] = -torch.inf
    return partials_3M


_LIBRARY = torch.library.Library("beit3_ds", "FRAGMENT")
_LIBRARY.define("logits_partials(Tensor logits, Tensor bias, Tensor target, int first, Tensor(a!) partials) -> ()")
_LIBRARY.define(
    "logits_gradient(Tensor(a!) logits, Tensor bias, Tensor target, int first, Tensor lse, Tensor d_loss) -> Tensor"
)


@torch.library.impl(_LIBRARY, "logits_partials", "CPU")
def _partials_cpu(logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    """The operator for checks: the model on a CPU never takes it."""
    _update_partials(logits_MN.to(partials_3M.dtype) + bias_N, target_M, first, partials_3M)


@torch.library.impl(_LIBRARY, "logits_gradient", "CPU")
def _gradient_cpu(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, lse_M: Tensor, d_loss_M: Tensor
) -> Tensor:
    """The operator for checks; writes gradients over logits and returns their sum over rows, (N,)."""
    d_MN = (logits_MN.to(lse_M.dtype) + bias_N).sub_(lse_M.unsqueeze(1)).exp_()
    index_M1, inside_M = _find(target_M, first, d_MN)
    d_MN.scatter_add_(1, index_M1, -inside_M.to(d_MN.dtype).unsqueeze(1)).mul_(d_loss_M.unsqueeze(1))
    logits_MN.copy_(d_MN)
    return d_MN.sum(0)


@torch.library.impl(_LIBRARY, "logits_partials", "CUDA")
def _partials_cuda(logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    from beit3_ds.kernels.triton.linear_cross_entropy_launch import choose_tiling, partials  # only a GPU needs Triton

    partials(logits_MN, bias_N, target_M, first, partials_3M, choose_tiling(logits_MN.dtype))


@torch.library.impl(_LIBRARY, "logits_gradient", "CUDA")
def _gradient_cuda(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, lse_M: Tensor, d_loss_M: Tensor
) -> Tensor:
    from beit3_ds.kernels.triton.linear_cross_entropy_launch import choose_tiling, gradient

    return gradient(logits_MN, bias_N, target_M, first, lse_M, d_loss_M, choose_tiling(logits_MN.dtype))


@torch.library.register_fake("beit3_ds::logits_partials", lib=_LIBRARY)
def _partials_fake(logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, partials_3M: Tensor) -> None:
    pass


@torch.library.register_fake("beit3_ds::logits_gradient", lib=_LIBRARY)
def _gradient_fake(
    logits_MN: Tensor, bias_N: Tensor, target_M: Tensor, first: int, lse_M: Tensor, d_loss_M: Tensor
) -> Tensor:
    return lse_M.new_empty(logits_MN.shape[1])


def _loss_dtype(h_MD: Tensor) -> torch.dtype:
    """float32 for half precision; float32 and float64 stay as they are."""
    return torch.promote_types(h_MD.dtype, torch.float32)
