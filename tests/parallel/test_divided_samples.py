"""Compares outputs and gradients of a head whose samples are divided over ranks with one process."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from beit3_ds.config import ParallelConfig
from beit3_ds.parallel import DividedSamples, TensorParallel, sum_gradients
from tests.ranks import run_ranks

RANKS, WIDTH = 2, 6


class ToyHead(nn.Module):
    """Changes the residual stream, as an adapter does, and computes two terms from rows that it reads twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.injector, self.unused, self.outputs = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 3)
        self.frozen = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    def forward(self, x_TD: Tensor, row_counts: tuple[int, ...], tensor: TensorParallel) -> tuple[Tensor, Tensor]:
        """Returns the changed stream and the sum of each term."""
        sum_gradients(self, tensor)
        divided = DividedSamples(tensor, row_counts)
        own = divided.take(x_TD)
        x_TD = x_TD + divided.merge(self.injector(own).tanh() * self.frozen)
        hidden = x_TD.cos()  # what all ranks compute in the same way, as blocks do
        own = self.outputs(divided.take(hidden)).square().sum() + self.outputs(divided.take(x_TD)).sum()
        first = own + self.unused(divided.take(hidden)[:0]).sum() * 0
        return x_TD, divided.sum_terms(torch.stack([first, divided.take(hidden).sum()]))


def run_head(row_counts: tuple[int, ...], tensor: TensorParallel, backwards: int) -> dict[str, Tensor]:
    head = ToyHead()
    x_TD = torch.randn(sum(row_counts), WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    for _ in range(backwards):
        stream, sums = head(x_TD, row_counts, tensor)
        (sums * torch.tensor([1.0, 0.5])).sum().backward()
    named = {name: p.grad for name, p in head.named_parameters() if p.requires_grad}
    return {"stream": stream.detach(), "sums": sums.detach(), "x": x_TD.grad, **named}


def measure(row_counts: tuple[int, ...]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Runs on one rank; returns the tensors of the divided head and those of one process."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(ParallelConfig(tensor_parallel_size=RANKS))
    return run_head(row_counts, mesh.tensor, 2), run_head(row_counts, TensorParallel(), 2)


@pytest.mark.parametrize("row_counts", [(3, 5, 2), (4,)])
def test_equals_one_process(row_counts: tuple[int, ...]) -> None:
    """Catches gradients of own samples only, gradients counted once per rank, and a hang of a rank without samples.

    Two backward passes catch hooks that are registered twice.
    """
    results = run_ranks(measure, RANKS, row_counts)
    for divided, whole in results:
        for name, expected in whole.items():
            torch.testing.assert_close(divided[name], expected, msg=lambda text, name=name: f"{name}: {text}")
    first, second = (divided for divided, _ in results)
    assert all(torch.equal(first[name], second[name]) for name in first), "tensor-parallel ranks stay bitwise equal"


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8])
def test_every_sample_is_on_one_rank(count: int) -> None:
    counts = tuple(range(count))
    parts = [DividedSamples(TensorParallel(rank=rank, size=3), counts) for rank in range(3)]
    assert Counter(i for part in parts for i in range(count)[part.own]) == Counter(range(count))
    rows = [row for part in parts for row in range(*part.own_rows)]
    assert rows == list(range(sum(counts)))
