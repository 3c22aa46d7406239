"""The tensor-parallel parts of a network against the undivided computation, outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.config import ParallelConfig
from beit3_ds.parallel import (
    Mesh,
    TensorParallel,
    VocabParallelEmbedding,
    VocabParallelHead,
    normalize_split,
    own_part,
)
from tests.ranks import run_ranks

RANKS = 2
ROWS, HIDDEN, VOCAB = 7, 12, 133


@given(st.integers(1, 16), st.integers(16, 70_000))
def test_vocabulary_shards_cover_it_once(size: int, vocab: int) -> None:
    splits = [TensorParallel(rank=rank, size=size).split_vocabulary(vocab) for rank in range(size)]
    assert [split.start for split in splits] == [0, *(split.stop for split in splits[:-1])]
    assert splits[-1].stop == vocab
    assert all(split.stop > split.start for split in splits)  # a rank without rows would have no maximum
    if vocab >= 64 * size:
        assert all(split.start % 64 == 0 for split in splits)


def build_mesh() -> Mesh:
    from beit3_ds.training.engine import init_process_group

    return init_process_group(ParallelConfig(tensor_parallel_size=RANKS))


def measure_norm(offset: float) -> tuple[Tensor, ...]:
    mesh = build_mesh()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, HIDDEN, generator=generator) + offset
    upstream = torch.randn(ROWS, HIDDEN, generator=generator)
    whole = x.clone().requires_grad_()
    expected = F.layer_norm(whole.double(), (HIDDEN,), eps=1e-5)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), whole)

    split = mesh.tensor.split(HIDDEN, dim=1)
    part = split.take(x).clone().requires_grad_()
    normed = normalize_split(part, 1e-5, mesh.tensor)
    (gradient,) = torch.autograd.grad((normed * split.take(upstream)).sum(), part)
    return normed, split.take(expected).float(), gradient, split.take(expected_gradient).float()


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_norm_over_a_split_width(offset: float) -> None:
    """An offset of 300 breaks E[x^2] - E[x]^2 in float32: it leaves no digit of a variance of 1."""
    for normed, expected, gradient, expected_gradient in run_ranks(measure_norm, RANKS, offset):
        torch.testing.assert_close(normed, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-4)


def measure_vocabulary(chunk_size: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    mesh = build_mesh()
    generator = torch.Generator().manual_seed(0)
    table, matrix = (torch.randn(VOCAB, HIDDEN, generator=generator, requires_grad=True) for _ in range(2))
    bias = torch.randn(VOCAB, generator=generator, requires_grad=True)
    ids, targets = (torch.randint(0, VOCAB, (ROWS,), generator=generator) for _ in range(2))
    upstream = torch.randn(ROWS, generator=generator)
    rows = F.embedding(ids, table)
    loss = F.cross_entropy(F.linear(rows, matrix, bias), targets, reduction="none")
    expected = torch.autograd.grad((loss * upstream).sum(), (table, matrix, bias))

    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, mesh.tensor)
    head = VocabParallelHead(HIDDEN, VOCAB, chunk_size, mesh.tensor)
    parts = {embedding.weight: table, head.weight: matrix, head.bias: bias}
    with torch.no_grad():
        for parameter, whole in parts.items():
            parameter.copy_(own_part(parameter, whole))
    own_loss = head(embedding(ids), targets)
    (own_loss * upstream).sum().backward()
    logits = head.logits(embedding(ids)).detach()
    pairs = {"loss": (own_loss.detach(), loss.detach()), "logits": (logits, F.linear(rows, matrix, bias).detach())}
    for name, parameter, gradient in zip(("table", "matrix", "bias"), parts, expected, strict=True):
        assert parameter.grad is not None
        pairs[name] = (parameter.grad, own_part(parameter, gradient).clone())
    return pairs


@pytest.mark.parametrize("chunk_size", [3, None])
def test_divided_vocabulary(chunk_size: int | None) -> None:
    for pairs in run_ranks(measure_vocabulary, RANKS, chunk_size):
        for name, (ours, expected) in pairs.items():
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
