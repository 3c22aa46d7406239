"""Tests that the weight gradient's kernel, interpreted, stays within its error bound for any division of rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.triton import multiway_ffn_launch, weight_gradient_launch
from beit3_ds.kernels.triton.multiway_ffn_launch import MatmulTiles
from beit3_ds.kernels.triton.weight_gradient_launch import choose_share_rows, splits_rows, weight_gradient
from tests.kernels.experts import RAGGED, Case, Slices, any_case
from tests.kernels.interpreter import interpreted

OUT, IN = 12, 20
TILES = MatmulTiles(8, 8, 4, 1, 1)  # both widths have a block of 4 that is masked


@contextmanager
def shares(rows: int | None) -> Iterator[None]:
    """Divides the rows into shares of `rows` rows; None gives each expert one share, without sums over shares."""
    with (
        interpreted(),
        mock.patch.object(multiway_ffn_launch, "choose_tiles", return_value=[TILES]),
        mock.patch.object(weight_gradient_launch, "splits_rows", return_value=rows is not None),
        mock.patch.object(weight_gradient_launch, "choose_share_rows", return_value=rows),
    ):
        yield


def gradients_of(case: Case, dys: list[Tensor], with_factor: bool) -> list[Tensor]:
    """Returns the launch's results as one list: all dW, then all db."""
    factor = case.factor if with_factor else None
    d_weights, d_biases = weight_gradient(dys, factor, case.x, case.slices, True)
    return [*d_weights, *d_biases]


@any_case
@pytest.mark.parametrize("rows", [3, 64, None])
def test_layers_that_share_an_input(rows: int | None, dtype: torch.dtype, slices: Slices) -> None:
    """Catches sums of another share, layer or expert, and unwritten results of experts without rows."""
    case = Case(slices, dtype, IN, OUT)
    dys, with_factor = [case.draw(*case.dy.shape) for _ in range(3)], slices == RAGGED[0]

    def reference(x: Tensor, factor: Tensor, *dys: Tensor) -> tuple[Tensor, ...]:
        scaled = [dy * factor[:, None] if with_factor else dy for dy in dys]
        d_weights = [dy[start:stop].t() @ x[start:stop] for dy in scaled for start, stop in slices]
        return *d_weights, *(dy[start:stop].sum(0) for dy in scaled for start, stop in slices)

    with shares(rows):
        results = gradients_of(case, dys, with_factor)
        assert all(map(torch.equal, results, gradients_of(case, dys, with_factor)))
    names = [f"{kind} of layer {layer}" for kind in ("dw", "db") for layer in range(3) for _ in slices]
    assert all(result.dtype == dtype for result in results)
    check_against_reference(names, results, reference, (case.x, case.factor, *dys))


@pytest.mark.parametrize("rows", [2, None])
def test_without_bias(rows: int | None) -> None:
    case = Case(RAGGED[1], torch.float32, IN, OUT)
    with shares(rows):
        d_weights, d_biases = weight_gradient([case.dy], None, case.x, case.slices, False)
    assert d_biases == []
    for (start, stop), d_weight in zip(case.slices, d_weights, strict=True):
        torch.testing.assert_close(d_weight, case.dy[start:stop].t() @ case.x[start:stop])


@given(
    lengths=st.lists(st.integers(0, 20_000), min_size=1, max_size=3),
    tiles=st.integers(1, 500),
    multiprocessors=st.sampled_from([108, 132, 148]),
)
def test_shares_are_not_slower_than_whole_experts(lengths: list[int], tiles: int, multiprocessors: int) -> None:
    """Catches shares so small that adding them takes longer than it saves: at most 16 shares and one per expert."""
    rows = choose_share_rows(lengths, tiles, multiprocessors)
    programs = tiles * sum(-(-length // rows) for length in lengths)
    assert rows % 64 == 0 and programs <= tiles * (16 + len(lengths))
    whole = -(-tiles * sum(map(bool, lengths)) // multiprocessors) * max(*lengths, 64)
    assert -(-programs // multiprocessors) * rows <= 2 * whole + 64 * (1 + programs // multiprocessors)


def test_base_uses_all_multiprocessors() -> None:
    """Checks a product of the base model: its 36 tiles of 128 x 128 need shares.

    Without shares, 96 of the 132 multiprocessors of an H100 would be idle.
    """
    assert splits_rows(36, 90) and not splits_rows(48 * 11, 90)
    rows = choose_share_rows([13_000, 3_400], 36, 132)
    waves = -(-36 * (-(-13_000 // rows) + -(-3_400 // rows)) // 132)
    assert waves * rows < 1.35 * 36 * 16_400 / 132 < 13_000
