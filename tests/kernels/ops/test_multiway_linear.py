"""The multiway linear op against its reference, with experts that have no rows."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops.multiway_linear import multiway_linear, multiway_linear_reference


def problem(lengths: list[int]) -> tuple:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    stops = torch.tensor(lengths).cumsum(0).tolist()
    slices = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    weights, biases = [draw(5, 3) for _ in lengths], [draw(5) for _ in lengths]
    return draw(sum(lengths), 3), slices, weights, biases


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_equals_reference(lengths: list[int]) -> None:
    x, slices, weights, biases = problem(lengths)
    leaves = [x, *weights, *biases]
    results = []
    for op in (multiway_linear, multiway_linear_reference):
        y = op(x, slices, weights, biases)
        weighted = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum()
        results.append([y, *torch.autograd.grad(weighted, leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradcheck() -> None:
    x, slices, weights, biases = problem([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, *p: multiway_linear(x, slices, p[:3], p[3:]), (x, *weights, *biases))
