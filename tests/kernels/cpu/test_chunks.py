"""Pieces of rows make the same of them as all rows at once."""

# T rows, F width.

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.cpu import chunks as row_pieces
from beit3_ds.kernels.cpu.chunks import add_parts, piece_length
from beit3_ds.kernels.ops import out_projection as out_module
from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm
from beit3_ds.kernels.ops.out_projection import out_projection
from beit3_ds.kernels.ops.sub_norm import SubNorm
from beit3_ds.kernels.ops.up_projection import Activation

SLICES = ((0, 37), (37, 37), (37, 50))
"""Three experts, one of them without rows."""


def results(dtype: torch.dtype, piece: int, chunk: int, gelu: bool, normalizes: bool) -> list[Tensor]:
    """Outputs and gradients of both ops that go by pieces."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    x, residual, weights = draw(50, 24), draw(50, 16), [draw(16, 24) for _ in SLICES]
    biases, scales, shifts = ([draw(width) for _ in SLICES] for width in (16, 24, 24))
    factor, d_y, d_h = torch.arange(50).remainder(3).to(dtype), draw(50, 16).detach(), draw(50, 24).detach()
    norm = SubNorm(scales, shifts, 1e-5, 24) if normalizes else None
    form: dict[str, Any] = {"gelu": gelu, "norm": norm, "residual_TD": residual, "factor_T": factor}
    with mock.patch.object(row_pieces, "_PIECE", piece), mock.patch.object(out_module, "_CHUNK_ROWS", chunk):
        stream, h = multiway_layer_norm(x, SLICES, scales, shifts, 1e-5)
        y = out_projection(Activation(stream), SLICES, weights, biases, **form)
        leaves = [x, residual, *weights, *biases, *scales, *shifts]
        return [y, h, *torch.autograd.grad((y, h), leaves, (d_y, d_h))]


@pytest.mark.parametrize("piece", [1, 24 * 5, 24 * 13])
@pytest.mark.parametrize(("gelu", "normalizes"), [(True, True), (True, False), (False, True), (False, False)])
def test_pieces_are_as_good_as_the_whole(piece: int, gelu: bool, normalizes: bool) -> None:
    whole = results(torch.float64, 10**6, 10**6, gelu, normalizes)
    for got, expected in zip(results(torch.float64, piece, 16, gelu, normalizes), whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_sums_over_pieces_are_rounded_to_half_precision_once() -> None:
    # 1 + 1/256 is no bfloat16: in bfloat16 the sum would stay 1 after every piece.
    parts = [torch.tensor([1.0]), *[torch.tensor([2.0**-8])] * 256]
    totals: list[Tensor] = []
    for part in parts:
        totals = add_parts(totals, [part.bfloat16()])
    assert totals[0].item() == 2.0


def test_pieces_have_at_least_a_row() -> None:
    assert piece_length(torch.empty(0, 3)) >= 1 and piece_length(torch.empty(2, 1 << 20)) == 1
    assert piece_length(torch.empty(5, 3, device="meta")) == 5
