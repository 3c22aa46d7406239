"""Tests that the kernels of the cross entropy, interpreted, stay within their error bound."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.triton.linear_cross_entropy_launch import LogitsTiling, choose_tiling, gradient, partials
from tests.kernels.interpreter import interpreted

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = LogitsTiling(partials_block=16, gradient_block=32, gradient_rows=2, gradient_programs=4, num_stages=2)
"""Tiling with many steps per loop and two groups of rows."""


class LogitsCase:
    """Holds logits in vocabulary tiles whose rows are padded with NaNs."""

    def __init__(self, rows: int, widths: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(rows)
        self.widths, vocab = widths, sum(widths)
        self.logits = (3 * torch.randn(rows, vocab, generator=generator)).to(device, dtype)
        self.bias, self.d_loss = (torch.randn(n, generator=generator).to(device, dtype) for n in (vocab, rows))
        self.target = torch.randint(0, vocab, (rows,), generator=generator).to(device)
        if rows > 2:
            self.target[0], self.target[1], self.target[2] = 0, vocab - 1, widths[0] - 1

    def tiles(self) -> list[tuple[int, Tensor]]:
        """Returns the first column and the logits of every tile."""
        result, first = [], 0
        for width in self.widths:
            buffer = self.logits.new_full((len(self.logits), -(-width // 64) * 64), torch.nan)
            buffer[:, :width] = self.logits[:, first : first + width]
            result.append((first, buffer[:, :width]))
            first += width
        return result

    def reference(self, logits: Tensor, bias: Tensor, d_loss: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss, the gradient of the logits, and the gradient's sum over rows."""

        def loss(logits: Tensor, bias: Tensor) -> Tensor:
            biased = logits.to(torch.promote_types(logits.dtype, torch.float32)) + bias
            return F.cross_entropy(biased, self.target, reduction="none")

        return with_gradients(loss)(logits, bias, d_loss)  # type: ignore[return-value]

    def run(self, tiling: LogitsTiling) -> tuple[Tensor, ...]:
        """Launches the kernels; returns loss and gradients."""
        state = torch.zeros(3, len(self.logits), device=self.logits.device)
        state[0] = -torch.inf
        for first, logits in self.tiles():
            partials(logits, self.bias[first : first + logits.shape[1]], self.target, first, state, tiling)
        largest, total, target_logit = state
        lse = largest + total.log()
        sums, gradients = [], []
        for first, logits in self.tiles():
            bias = self.bias[first : first + logits.shape[1]]
            sums.append(gradient(logits, bias, self.target, first, lse, self.d_loss.float(), tiling))
            gradients.append(logits)
        return lse - target_logit, torch.cat(gradients, 1), torch.cat(sums)

    def check(self, results: tuple[Tensor, ...]) -> None:
        check_against_reference(
            ("loss", "d_logits", "d_bias"), results, self.reference, (self.logits, self.bias, self.d_loss)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "widths"), [(5, (70, 13)), (1, (3,)), (9, (64, 64, 1))], ids=str)
def test_kernels_follow_the_reference(rows: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    """Catches errors in tiles that end inside a kernel's block, in padding, and for targets in outer columns."""
    case = LogitsCase(rows, widths, dtype)
    with interpreted():
        case.check(case.run(SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shipped_tiles(dtype: torch.dtype) -> None:
    case = LogitsCase(9, (5000, 300), dtype)
    with interpreted():
        case.check(case.run(choose_tiling(dtype)))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_kernels_do_not_overflow() -> None:
    """Catches an overflow, also in absent rows, whose logits are the biases alone."""
    case = LogitsCase(3, (70, 13), torch.float32)
    case.logits *= 1e3
    case.bias += 200
    with interpreted():
        case.check(case.run(SMALL))


def test_no_rows() -> None:
    case = LogitsCase(0, (5,), torch.float32)
    with interpreted():
        loss, gradients, sums = case.run(SMALL)
    assert loss.shape == (0,) and gradients.shape == (0, 5)
    assert torch.equal(sums, torch.zeros(5))


@pytest.mark.slow
@given(
    rows=st.integers(1, 40),
    widths=st.lists(st.integers(1, 200), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=30, deadline=None)
def test_any_logits(rows: int, widths: tuple[int, ...], dtype: torch.dtype) -> None:
    case = LogitsCase(rows, widths, dtype)
    with interpreted():
        case.check(case.run(LogitsTiling(32, 16, 4, 20, 2)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype) -> None:
    """Runs the kernels on a GPU twice, because results must be deterministic."""
    for rows, widths in ((5, (70, 13)), (600, (8192,)), (350, (23360, 17290)), (0, (5,))):
        case = LogitsCase(rows, widths, dtype, "cuda")
        first, second = (case.run(choose_tiling(dtype)) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        if rows:
            case.check(first)
