"""Draws rows and parameters of a few experts for the tests of the multiway kernels."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.triton.sub_norm_launch import Norm

Slices = list[tuple[int, int]]
EPSILON = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# Experts that end inside of a tile, own one row, or none, at either end or in between; one expert, and two.
RAGGED: list[Slices] = [
    [(0, 6), (6, 9), (9, 10)],
    [(0, 5), (5, 5), (5, 9)],
    [(0, 0), (0, 1), (1, 1)],
    [(0, 4), (4, 13)],
    [(0, 7)],
]
CASES = [(torch.float32, slices) for slices in RAGGED] + [(dtype, RAGGED[0]) for dtype in DTYPES[1:]]
any_case = pytest.mark.parametrize(("dtype", "slices"), CASES, ids=str)


class Case:
    """Holds random rows, and parameters of every expert, of the given widths."""

    def __init__(self, slices: Slices, dtype: torch.dtype, in_width: int, out_width: int, device: str = "cpu") -> None:
        self.slices, self.dtype, self.device = slices, dtype, device
        self.generator = torch.Generator().manual_seed(slices[-1][1] + in_width)
        num_rows = slices[-1][1]
        self.x = self.draw(num_rows, in_width)
        self.residual, self.dy = self.draw(num_rows, out_width), self.draw(num_rows, out_width)
        self.factor = (self.draw(num_rows) > 0).to(dtype) * 1.25
        self.weights = [self.draw(out_width, in_width) / 4 for _ in slices]
        self.biases = [self.draw(out_width) for _ in slices]
        self.scales = [1 + self.draw(in_width) / 4 for _ in slices]
        self.shifts = [self.draw(in_width) for _ in slices]

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def norm(self, a: Tensor) -> Norm:
        """Returns the sub-LN of rows, with float32 statistics."""
        mean = a.double().mean(1)
        variance = (a - mean[:, None]).square().mean(1)
        return mean.float(), (variance + EPSILON).rsqrt().float(), self.scales, self.shifts

    def linear(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
        """Computes the reference: each expert's layer on the expert's own rows."""
        parts = [x[start:stop] for start, stop in self.slices]
        biases = biases or [x.new_zeros(len(weights[0]))] * len(parts)
        return torch.cat([F.linear(part, w, b) for part, w, b in zip(parts, weights, biases, strict=True)])

    def layer_norm(self, a: Tensor, scales: Sequence[Tensor], shifts: Sequence[Tensor]) -> Tensor:
        parts = zip(self.slices, scales, shifts, strict=True)
        width = a.shape[1:]
        return torch.cat([F.layer_norm(a[i:j], width, scale, shift, EPSILON) for (i, j), scale, shift in parts])


def split(tensors: Sequence[Tensor], kinds: int) -> list[list[Tensor]]:
    """Splits a flat list of parameters by kind; each kind has one parameter per expert."""
    size = len(tensors) // kinds
    return [list(tensors[start : start + size]) for start in range(0, len(tensors), size)]


def check_statistics(a: Tensor, mean: Tensor, squares: Tensor) -> None:
    """Catches statistics of unrounded values, statistics of a part of a row, and E[x^2] - E[x]^2."""
    assert mean.dtype == squares.dtype == torch.float32
    variance, expected = torch.var_mean(a.double(), 1, correction=0)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(squares.double(), variance * a.shape[1], rtol=1e-4, atol=1e-6)


def build_slices(lengths: list[int]) -> Slices:
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return list(zip([0, *stops], stops, strict=False))


lengths_of_experts = st.lists(st.integers(0, 9), min_size=1, max_size=3).filter(any)
