"""Tests that chunks of rows give the results of all rows at once."""

# T rows, F width.

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.cpu import chunks
from beit3_ds.kernels.cpu.chunks import accumulate, chunk_rows
from beit3_ds.kernels.ops import out_projection as out_module
from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation

SLICES = ((0, 37), (37, 37), (37, 50))
"""First and last row of three experts, one of them without rows."""


def results(dtype: torch.dtype, elements: int, matmul_rows: int, gelu: bool, normalizes: bool) -> list[Tensor]:
    """Returns outputs and gradients of the two ops that process rows in chunks."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, residual, weights = draw(50, 24), draw(50, 16), [draw(16, 24) for _ in SLICES]
    biases, scales, shifts = ([draw(width) for _ in SLICES] for width in (16, 24, 24))
    factor, d_y, d_h = torch.arange(50).remainder(3).to(dtype), draw(50, 16).detach(), draw(50, 24).detach()
    norm = SubNorm(scales, shifts, 1e-5, 24) if normalizes else None
    form: dict[str, Any] = {"gelu": gelu, "norm": norm, "residual_TD": residual, "factor_T": factor}
    with (
        mock.patch.object(chunks, "_CHUNK_ELEMENTS", elements),
        mock.patch.object(out_module, "_MATMUL_ROWS", matmul_rows),
    ):
        stream, h = multiway_layer_norm(x, SLICES, scales, shifts, 1e-5)
        y = out_projection(Activation(stream), SLICES, weights, biases, **form)
        leaves = [x, residual, *weights, *biases, *scales, *shifts]
        return [y, h, *torch.autograd.grad((y, h), leaves, (d_y, d_h))]


@pytest.mark.parametrize("elements", [1, 24 * 5, 24 * 13])
@pytest.mark.parametrize(("gelu", "normalizes"), [(True, True), (True, False), (False, True), (False, False)])
def test_chunks_equal_the_whole(elements: int, gelu: bool, normalizes: bool) -> None:
    whole = results(torch.float64, 10**6, 10**6, gelu, normalizes)
    for got, expected in zip(results(torch.float64, elements, 16, gelu, normalizes), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_sums_over_chunks_are_rounded_to_half_precision_once() -> None:
    # 1 + 1/256 is no bfloat16: in bfloat16 the sum would stay 1 after every chunk.
    parts = [torch.tensor([1.0]), *[torch.tensor([2.0**-8])] * 256]
    totals: list[Tensor] = []
    for part in parts:
        totals = accumulate(totals, [part.bfloat16()])
    assert totals[0].item() == 2.0


def test_chunks_have_at_least_a_row() -> None:
    assert chunk_rows(torch.empty(0, 3)) >= 1 and chunk_rows(torch.empty(2, 1 << 20)) == 1
    assert chunk_rows(torch.empty(5, 3, device="meta")) == 5
