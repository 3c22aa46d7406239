"""Tests that the kernels that add a branch, interpreted, stay within their error bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.triton.expert_rows_launch import RowTiling, choose_row_tiling
from tests.kernels.ops.test_residual_add import DTYPES, SMALL, Case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "width", "with_factor"),
    [((9, 0, 7), 24, True), ((1, 8), 768, True), ((0, 5, 1), 1408, False)],
    ids=str,
)
def test_kernels_follow_the_reference(
    lengths: tuple[int, ...], width: int, with_factor: bool, dtype: torch.dtype
) -> None:
    """Checks ragged, empty and one-row experts, many rows per program, and widths that are no power of two."""
    case = Case(lengths, width, dtype, with_factor)
    case.check(case.interpret(SMALL))


def test_shipped_tiles() -> None:
    case = Case((2, 1, 1), 1408, torch.bfloat16, with_factor=True)
    case.check(case.interpret(choose_row_tiling(90, 1408)))


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), with_factor=st.booleans())
@settings(max_examples=8, deadline=None)
def test_any_lengths(lengths: list[int], with_factor: bool) -> None:
    case = Case(lengths, 12, torch.float32, with_factor)
    case.check(case.interpret(SMALL))


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    with_factor=st.booleans(),
    programs=st.integers(4, 40),
)
@settings(max_examples=60, deadline=None)
def test_any_lengths_widths_and_dtypes(lengths, width, dtype, with_factor, programs) -> None:  # type: ignore[no-untyped-def]
    case = Case(lengths, width, dtype, with_factor)
    case.check(case.interpret(RowTiling(1, 2, programs, programs)))
