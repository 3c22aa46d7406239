"""The chunked cross entropy against full logits, and its partials against a sharded vocabulary."""

import pytest
import torch
from beit3_ds.kernels.linear_cross_entropy import (
    cross_entropy_gradients,
    cross_entropy_partials,
    linear_cross_entropy,
    linear_cross_entropy_reference,
)


def problem(rows: int, vocab: int = 11) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    h = torch.randn(rows, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(vocab, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    b = torch.randn(vocab, generator=generator, dtype=torch.float64, requires_grad=True)
    return h, w, b, torch.randint(0, vocab, (rows,), generator=generator)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9])
@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
def test_equals_reference(rows: int, chunk_size: int | None) -> None:
    h, w, b, target = problem(rows)
    ours, expected = linear_cross_entropy(h, w, b, target, chunk_size), linear_cross_entropy_reference(h, w, b, target)
    torch.testing.assert_close(ours, expected)
    upstream = torch.arange(rows, dtype=torch.float64) + 0.5  # catches a gradient that forgets its row's factor
    for mine, theirs in zip(
        torch.autograd.grad((ours * upstream).sum(), (h, w, b)),
        torch.autograd.grad((expected * upstream).sum(), (h, w, b)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


def test_large_logits_do_not_overflow() -> None:
    h, w, b, target = (t.float() if t.is_floating_point() else t for t in problem(3))
    loss = linear_cross_entropy(h * 1e3, w, b, target, 2)
    assert torch.isfinite(loss).all()
    torch.testing.assert_close(loss, linear_cross_entropy_reference(h * 1e3, w, b, target))


def test_partials_of_a_sharded_vocabulary_add_up() -> None:
    """What a vocabulary-parallel loss will reduce: catches a target that two shards, or none, claim."""
    h, w, b, target = (t.detach() for t in problem(6))
    upstream, cut = torch.rand(6, dtype=torch.float64), 4
    shards = [(w[:cut], b[:cut], target), (w[cut:], b[cut:], target - cut)]
    maxima, sums, targets = zip(*(cross_entropy_partials(h, *shard, 4)[0] for shard in shards), strict=True)
    top = torch.maximum(*maxima)
    lse = top + sum(s * (m - top).exp() for s, m in zip(sums, maxima, strict=True)).log()
    torch.testing.assert_close(lse - sum(targets), linear_cross_entropy_reference(h, w, b, target))

    whole = cross_entropy_gradients(h, w, b, target, lse, upstream, 4)
    parts = [cross_entropy_gradients(h, *shard, lse, upstream, 4) for shard in shards]
    torch.testing.assert_close(parts[0][0] + parts[1][0], whole[0])
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), whole[1])


def test_full_logits_never_exist() -> None:
    """The largest tensor that the op makes stays at chunk x vocabulary (or the matrix and its gradient)."""
    rows, vocab, chunk = 64, 500, 8
    h, w, b, target = problem(rows, vocab)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        linear_cross_entropy(h, w, b, target, chunk).sum().backward()
    assert largest <= chunk * vocab < rows * vocab
