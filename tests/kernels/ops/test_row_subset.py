"""Compares rows that are taken out, processed and put back with autograd's own indexing."""

import pytest
import torch

from beit3_ds.kernels.ops.row_subset import put_rows, take_rows

ROWS = {"some": [1, 2, 5], "none": [], "all": list(range(7))}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_replaced_and_gradients_follow(rows: list[int]) -> None:
    """Catches a gradient of replaced rows that reaches the stream directly, and one that is lost."""
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(*shape, generator=generator) for shape in ((7, 4), (4, 4), (7, 4)))
    rows_K = torch.tensor(rows, dtype=torch.int64)

    def ours(x: torch.Tensor) -> torch.Tensor:
        stream, picked = take_rows(x * 1, rows_K)
        return put_rows(stream, torch.tanh(picked @ weight), rows_K)

    def plain(x: torch.Tensor) -> torch.Tensor:
        return (x * 1).index_copy(0, rows_K, torch.tanh(x[rows_K] @ weight))

    results = []
    for function in (ours, plain):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    for ours_, plain_ in zip(*results, strict=True):
        torch.testing.assert_close(ours_, plain_)


def test_neither_stream_nor_gradient_is_written_to() -> None:
    """Catches writes to the stream or its gradient.

    A checkpoint reuses the stream, and autograd may pass one gradient to several operations.
    """
    x, rows_K = torch.randn(5, 3, requires_grad=True), torch.tensor([0, 3])
    before = x.detach().clone()
    stream, picked = take_rows(x, rows_K)
    y, dy = put_rows(stream, picked * 2, rows_K), torch.ones(5, 3)
    torch.autograd.grad(y, x, dy)
    assert torch.equal(x, before) and torch.equal(dy, torch.ones(5, 3))
