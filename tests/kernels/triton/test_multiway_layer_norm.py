"""Tests that the LayerNorm kernels, interpreted, stay within their error bound."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.triton.expert_rows_launch import RowTiling, choose_row_tiling
from tests.kernels.ops.test_multiway_layer_norm import DTYPES, SMALL, Case


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "width", "with_stream"), [((9, 0, 7), 24, True), ((1, 8), 768, True), ((0, 5, 1), 1408, False)], ids=str
)
def test_kernels_follow_the_reference(
    lengths: tuple[int, ...], width: int, with_stream: bool, dtype: torch.dtype
) -> None:
    """Checks ragged, empty and one-row experts, many rows per program, and widths that are no power of two."""
    case = Case(lengths, width, dtype)
    case.check(case.interpret(SMALL, with_stream), with_stream)


@pytest.mark.parametrize(("lengths", "width"), [((2, 1, 1), 1408), ((2,), 6144)], ids=str)
def test_shipped_tiles(lengths: tuple[int, ...], width: int) -> None:
    case = Case(lengths, width, torch.bfloat16)
    case.check(case.interpret(choose_row_tiling(90, width), with_stream=True), with_stream=True)


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3), with_stream=st.booleans())
@settings(max_examples=8, deadline=None)
def test_any_lengths(lengths: list[int], with_stream: bool) -> None:
    case = Case(lengths, 12, torch.float32)
    case.check(case.interpret(SMALL, with_stream), with_stream)


@pytest.mark.slow
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    width=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    with_stream=st.booleans(),
    programs=st.integers(4, 40),
)
@settings(max_examples=60, deadline=None)
def test_any_lengths_widths_and_dtypes(lengths, width, dtype, with_stream, programs) -> None:  # type: ignore[no-untyped-def]
    case = Case(lengths, width, dtype)
    case.check(case.interpret(RowTiling(1, 2, programs, programs), with_stream), with_stream)


@pytest.mark.slow
@pytest.mark.parametrize("width", [768, 1024, 1408, 3072, 4096, 6144, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_shipped_widths(dtype: torch.dtype, width: int) -> None:
    case = Case((5, 0, 4), width, dtype)
    case.check(case.interpret(choose_row_tiling(90, width), with_stream=True), with_stream=True)
