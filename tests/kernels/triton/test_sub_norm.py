"""Tests that the kernels of the sub-LN, interpreted, stay within their error bound."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.triton import sub_norm_launch as launch
from beit3_ds.kernels.triton.sub_norm_launch import norm_gradient, norm_gradient_sums, normalize, row_statistics
from tests.kernels.experts import (
    DTYPES,
    RAGGED,
    Case,
    Slices,
    any_case,
    build_slices,
    check_statistics,
    lengths_of_experts,
    split,
)
from tests.kernels.interpreter import interpreted

WIDTH = 20


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets blocks so small that tiny problems have many blocks, with two blocks per span."""
    monkeypatch.setattr(launch, "BLOCK", {"ROWS": 2, "COLUMNS": 8})
    monkeypatch.setattr(launch, "SPAN", 4)


def reference(case: Case, gelu: bool, x: Tensor, *parameters: Tensor) -> Tensor:
    """Computes LN(gelu(x)) with each expert's parameters, or gelu(x) without parameters."""
    a = F.gelu(x) if gelu else x
    return case.layer_norm(a, *split(parameters, 2)) if parameters else a


def prepare(slices: Slices, dtype: torch.dtype, gelu: bool) -> tuple[Case, launch.Norm]:
    """Returns a case whose x and dy have the norm's width, and the norm."""
    case = Case(slices, dtype, WIDTH, WIDTH)
    return case, case.norm(F.gelu(case.x.float()).to(dtype) if gelu else case.x)


@any_case
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_normalize(gelu: bool, dtype: torch.dtype, slices: Slices) -> None:
    case, norm = prepare(slices, dtype, gelu)
    with interpreted():
        n, a = normalize(case.x, gelu, norm, slices), normalize(case.x, gelu, None, slices)
    inputs = (case.x, *case.scales, *case.shifts)
    check_against_reference(
        ("n", "a"), (n, a), lambda *x: (reference(case, gelu, *x), reference(case, gelu, x[0])), inputs
    )


def check_gradients(slices: Slices, dtype: torch.dtype, gelu: bool) -> None:
    """Checks the gradients of rows with and without a norm."""
    case, norm = prepare(slices, dtype, gelu)
    with interpreted():
        sums, d_scales, d_shifts = norm_gradient_sums(case.dy, case.x, gelu, norm, slices)
        dx = norm_gradient(case.dy.clone(), case.x, gelu, norm, sums, WIDTH, slices)
        plain = norm_gradient(case.dy.clone(), case.x, gelu, None, None, WIDTH, slices)
    assert sums.dtype == torch.float32
    inputs = (case.x, *case.scales, *case.shifts, case.dy)
    names = ("dx", *["d_scale"] * len(slices), *["d_shift"] * len(slices))
    normed = with_gradients(lambda *x: reference(case, gelu, *x))
    check_against_reference(names, (dx, *d_scales, *d_shifts), lambda *x: normed(*x)[1:], inputs)
    activated = with_gradients(lambda x: reference(case, gelu, x))
    check_against_reference(("dx",), (plain,), lambda *x: activated(*x)[1:], (case.x, case.dy))


@any_case
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_gradients(gelu: bool, dtype: torch.dtype, slices: Slices) -> None:
    check_gradients(slices, dtype, gelu)


@given(lengths=lengths_of_experts, gelu=st.booleans())
@settings(max_examples=4, deadline=None)
def test_any_slices(lengths: list[int], gelu: bool) -> None:
    check_gradients(build_slices(lengths), torch.float32, gelu)


def test_columns_of_two_ranks() -> None:
    """Emulates two ranks with half of every row each: sums are added, and a row is wider than a rank's columns."""
    slices = RAGGED[0]
    case, (mean, rstd, scales, shifts) = prepare(slices, torch.float32, gelu=True)
    halves = [slice(0, 12), slice(12, WIDTH)]
    with interpreted():
        parts = []
        for columns in halves:
            norm = mean, rstd, [x[columns].contiguous() for x in scales], [x[columns].contiguous() for x in shifts]
            x, dn = case.x[:, columns].contiguous(), case.dy[:, columns].contiguous()
            parts.append((dn, x, norm, *norm_gradient_sums(dn, x, True, norm, slices)))
        total = parts[0][3] + parts[1][3]
        dx = torch.cat([norm_gradient(dn, x, True, norm, total, WIDTH, slices) for dn, x, norm, *_ in parts], 1)
    gradients = [torch.cat(pair) for part in (4, 5) for pair in zip(parts[0][part], parts[1][part], strict=True)]
    names = ("dx", *["d_scale"] * 3, *["d_shift"] * 3)
    whole = with_gradients(lambda *x: reference(case, True, *x))
    inputs = (case.x, *case.scales, *case.shifts, case.dy)
    check_against_reference(names, (dx, *gradients), lambda *x: whole(*x)[1:], inputs)


def test_gradient_is_written_in_place() -> None:
    case, norm = prepare(RAGGED[0], torch.float32, gelu=True)
    with interpreted():
        sums, *_ = norm_gradient_sums(case.dy, case.x, True, norm, RAGGED[0])
        dx = norm_gradient(case.dy, case.x, True, norm, sums, WIDTH, RAGGED[0])
    assert dx.data_ptr() == case.dy.data_ptr()


def test_other_experts_do_not_matter() -> None:
    """Catches a kernel that reads another expert's rows or parameters; NaNs there must change nothing."""
    slices = [(0, 5), (5, 9)]
    outputs = []
    for value in (0.0, torch.nan):
        case, norm = prepare(slices, torch.float32, gelu=True)
        for x in (case.x[5:], case.dy[5:], norm[0][5:], norm[1][5:], case.scales[1], case.shifts[1]):
            x.fill_(value)
        with interpreted():
            n = normalize(case.x, True, norm, slices)
            sums, d_scales, d_shifts = norm_gradient_sums(case.dy, case.x, True, norm, slices)
            dx = norm_gradient(case.dy, case.x, True, norm, sums, WIDTH, slices)
        outputs.append((n[:5], sums[:, :5], dx[:5], d_scales[0], d_shifts[0]))
    assert all(torch.equal(clean, other) for clean, other in zip(*outputs, strict=True))


@pytest.mark.parametrize("width", [1, 20, 33])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_statistics(dtype: torch.dtype, width: int) -> None:
    y = torch.randn(5, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    with interpreted():
        check_statistics(y, *row_statistics(y, False))
        mean, squares = row_statistics(y, True)
    a = F.gelu(y.float()).to(dtype).float()
    torch.testing.assert_close(mean, a.mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(squares, a.var(1, correction=0) * width, rtol=1e-3, atol=1e-5)


def test_statistics_are_stable() -> None:
    """Catches E[x^2] - E[x]^2, which has no correct digit in float32 if the mean is 10,000 standard deviations."""
    y = 1e4 + torch.randn(5, 20, generator=torch.Generator().manual_seed(0))
    variance, expected = torch.var_mean(y.double(), 1, correction=0)
    with interpreted():
        mean, squares = row_statistics(y, False)
    torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares.double(), variance * 20, rtol=1e-2, atol=0)


def test_shipped_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with mock.patch(f"{__name__}.WIDTH", 136):
        check_gradients([(0, 140), (140, 141)], torch.bfloat16, gelu=True)


def test_no_rows() -> None:
    slices = [(0, 0), (0, 0)]
    case, norm = prepare(slices, torch.float32, gelu=True)
    with interpreted():
        assert all(x.shape == (0,) for x in row_statistics(case.x, True))
        assert normalize(case.x, True, norm, slices).shape == (0, WIDTH)
        sums, d_scales, d_shifts = norm_gradient_sums(case.dy, case.x, True, norm, slices)
        assert norm_gradient(case.dy, case.x, True, norm, sums, WIDTH, slices).shape == (0, WIDTH)
    assert sums.shape == (2, 0)
    assert all(not gradient.any() and gradient.shape == (WIDTH,) for gradient in (*d_scales, *d_shifts))


@pytest.mark.slow
@given(lengths=lengths_of_experts, width=st.integers(8, 40), gelu=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_slices_and_widths(lengths: list[int], width: int, gelu: bool) -> None:
    """Checks float32 rows of at least 8 columns.

    In a row of two nearly equal values, the gradient consists of rounding errors.
    """
    with mock.patch(f"{__name__}.WIDTH", width):
        check_gradients(build_slices(lengths), torch.float32, gelu)
