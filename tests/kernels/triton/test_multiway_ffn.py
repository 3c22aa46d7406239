"""Tests that the multiway FFN's kernels, interpreted, stay within their error bound."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.triton import multiway_ffn_launch as launch
from beit3_ds.kernels.triton.multiway_ffn_launch import MatmulTiles, choose_tiles
from beit3_ds.kernels.triton.sub_norm_launch import norm_gradient, norm_gradient_sums, normalize, row_statistics
from beit3_ds.kernels.triton.weight_gradient_launch import weight_gradient
from tests.kernels.experts import (
    DTYPES,
    EPSILON,
    RAGGED,
    Case,
    Slices,
    any_case,
    build_slices,
    lengths_of_experts,
    split,
)
from tests.kernels.interpreter import interpreted

SMALL = MatmulTiles(4, 8, 8, 1, 1)
D, F_ = 20, 12  # neither a multiple of the small tiles' 8: both have a block of 4 that is masked


@contextmanager
def small_tiles() -> Iterator[None]:
    """Interprets kernels with tiles so small that tiny problems have many tiles."""
    with interpreted(), mock.patch.object(launch, "choose_tiles", return_value=[SMALL]):
        yield


def check_linear(case: Case, with_bias: bool = True) -> None:
    """Checks the output and all gradients of the linear layer."""

    def reference(x: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = split(parameters, 2) if with_bias else (parameters, ())
        return case.linear(x, weights, biases)

    biases = case.biases if with_bias else []
    y = launch.linear(case.x, case.slices, case.weights, biases)
    dx = launch.input_gradient(case.dy, None, case.slices, case.weights)
    d_weights, d_biases = weight_gradient([case.dy], None, case.x, case.slices, with_bias)
    assert len(d_biases) == len(biases)
    results = (y, dx, *d_weights, *d_biases)
    names = ("y", "dx", *(f"dw_{i}" for i in range(len(d_weights))), *(f"db_{i}" for i in range(len(d_biases))))
    assert all(result.dtype == case.dtype for result in results)
    check_against_reference(names, results, with_gradients(reference), (case.x, *case.weights, *biases, case.dy))


@any_case
def test_linear(dtype: torch.dtype, slices: Slices) -> None:
    with small_tiles():
        check_linear(Case(slices, dtype, D, F_), with_bias=slices != RAGGED[1])


@any_case
def test_gradients_with_a_factor(dtype: torch.dtype, slices: Slices) -> None:
    """Catches a drop-path factor, in half precision or float32, that is left out or applied twice."""
    case = Case(slices, dtype, D, F_)

    def reference(x: Tensor, *tensors: Tensor) -> Tensor:
        return case.linear(x, *split(tensors, 2)) * case.factor[:, None].to(x.dtype)

    factor = case.factor.float() if slices is RAGGED[0] else case.factor
    with small_tiles():
        dx = launch.input_gradient(case.dy, factor, slices, case.weights)
        d_weights, d_biases = weight_gradient([case.dy], factor, case.x, slices, True)
    names = ["dx", *["dw"] * len(slices), *["db"] * len(slices)]
    inputs = (case.x, *case.weights, *case.biases, case.dy)
    check_against_reference(names, (dx, *d_weights, *d_biases), lambda *x: with_gradients(reference)(*x)[1:], inputs)


@any_case
def test_up_projection(dtype: torch.dtype, slices: Slices) -> None:
    case = Case(slices, dtype, D, F_)

    def reference(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        u = case.linear(x, *split(parameters, 2))
        return u, F.gelu(u)

    with small_tiles():
        u, a = launch.up_projection(case.x, slices, case.weights, case.biases)
    check_against_reference(("u", "a"), (u, a), reference, (case.x, *case.weights, *case.biases))
    # The backward pass makes a of the u that was kept: it must find the same, to the bit that float32 leaves open.
    torch.testing.assert_close(a.float(), F.gelu(u.float()).to(dtype).float(), rtol=1e-6, atol=1e-6)


@any_case
def test_out_projection(dtype: torch.dtype, slices: Slices) -> None:
    """Checks the whole op, and the partial product that tensor-parallel ranks sum before bias and residual."""
    case = Case(slices, dtype, D, F_)
    residual, factor = case.residual, case.factor

    def whole(residual: Tensor, factor: Tensor, n: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return (residual + factor[:, None] * case.linear(n, *split(parameters, 2)),)

    def partial_product(n: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return (case.linear(n, weights, ()),)

    with small_tiles():
        y = launch.out_projection(case.x, slices, case.weights, case.biases, residual, factor)
        part = launch.out_projection(case.x, slices, case.weights, [], None, None)
    check_against_reference(("y",), (y,), whole, (residual, factor, case.x, *case.weights, *case.biases))
    check_against_reference(("part",), (part,), partial_product, (case.x, *case.weights))


def test_other_experts_do_not_matter() -> None:
    """Catches a kernel that reads another expert's rows or weights; NaNs there must change nothing."""
    slices = RAGGED[0]
    case = Case(slices, torch.float32, D, F_)
    outputs = []
    for value in (0.0, torch.nan):
        case.x[6:] = case.dy[6:] = case.factor[6:] = value
        for parameter in (*case.weights[1:], *case.biases[1:]):
            parameter.fill_(value)
        with small_tiles():
            u, a = launch.up_projection(case.x, slices, case.weights, case.biases)
            y = launch.out_projection(case.x, slices, case.weights, case.biases, u, case.factor)
            dx = launch.input_gradient(case.dy, case.factor, slices, case.weights)
            d_weights, d_biases = weight_gradient([case.dy], case.factor, case.x, slices, True)
        outputs.append((u[:6], a[:6], y[:6], dx[:6], d_weights[0], d_biases[0]))
    assert all(torch.equal(clean, other) for clean, other in zip(*outputs, strict=True))


def reference_ffn(case: Case, epsilon: float, x: Tensor, *parameters: Tensor) -> Tensor:
    """Computes x + factor * fc2(LN(gelu(fc1(x)))) with each expert's own parameters."""
    w_1, b_1, scales, shifts, w_2, b_2 = split(parameters, 6)
    a = F.gelu(case.linear(x, w_1, b_1))
    parts = zip(case.slices, scales, shifts, strict=True)
    n = torch.cat([F.layer_norm(a[i:j], a.shape[1:], scale, shift, epsilon) for (i, j), scale, shift in parts])
    return x + case.factor[:, None].to(x.dtype) * case.linear(n, w_2, b_2)


def run_ffn(case: Case, epsilon: float, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    """Computes `reference_ffn` with kernels, called as by the operators.

    Returns:
        The output, and the gradients of x and of all parameters.
    """
    slices, factor, dy = case.slices, case.factor, rest[-1]
    w_1, b_1, scales, shifts, w_2, b_2 = split(rest[:-1], 6)
    u, _ = launch.up_projection(x, slices, w_1, b_1)
    width = u.shape[1]
    mean, squares = row_statistics(u, True)
    norm = mean, (squares / width + epsilon).rsqrt(), scales, shifts
    y = launch.out_projection(normalize(u, True, norm, slices), slices, w_2, b_2, x, factor)

    dn = launch.input_gradient(dy, factor, slices, w_2)
    d_w_2, d_b_2 = weight_gradient([dy], factor, normalize(u, True, norm, slices), slices, True)
    sums, d_scales, d_shifts = norm_gradient_sums(dn, u, True, norm, slices)
    du = norm_gradient(dn, u, True, norm, sums, width, slices)
    dx = dy + launch.input_gradient(du, None, slices, w_1)
    d_w_1, d_b_1 = weight_gradient([du], None, x, slices, True)
    return y, dx, *d_w_1, *d_b_1, *d_scales, *d_shifts, *d_w_2, *d_b_2


def check_ffn(slices: Slices, dtype: torch.dtype, hidden: int = F_, ffn_hidden: int = D, device: str = "cpu") -> None:
    first, second = (
        Case(slices, dtype, hidden, ffn_hidden, device),
        Case(slices, dtype, ffn_hidden, hidden, device),
    )
    parameters = (
        *first.weights,
        *first.biases,
        *second.scales,
        *second.shifts,
        *second.weights,
        *second.biases,
    )
    inputs = (first.x, *parameters, second.dy)
    results = run_ffn(first, EPSILON, *inputs)
    parts = ("w_1", "b_1", "scale", "shift", "w_2", "b_2")
    names = ("y", "dx", *(f"d_{part} of expert {i}" for part in parts for i in range(len(slices))))
    check_against_reference(names, results, with_gradients(lambda *x: reference_ffn(first, EPSILON, *x)), inputs)


def test_whole_ffn() -> None:
    """Checks the FFN in float32; in half precision, torch's own error varies too much on a tiny problem."""
    with small_tiles():
        check_ffn(RAGGED[0], torch.float32)


def test_shipped_tiles() -> None:
    """Checks the bfloat16 tiles of sm_90: two row tiles of different experts, and two column tiles per layer."""
    with interpreted():
        check_ffn([(0, 130), (130, 131)], torch.bfloat16, hidden=136, ffn_hidden=144)


def test_interpreter_leaves_the_compiler_alone() -> None:
    """Catches functions of `triton.language` that stay interpreted, which makes tests depend on their order."""
    owners = (tl, tl.core, tl.math, tl.tensor, tl.dtype)
    before = [dict(vars(owner)) for owner in owners]
    with small_tiles():
        check_linear(Case(RAGGED[2], torch.float32, D, F_))
    assert [dict(vars(owner)) for owner in owners] == before


def test_no_rows() -> None:
    case = Case([(0, 0), (0, 0)], torch.float32, D, F_)
    with small_tiles():
        u, a = launch.up_projection(case.x, case.slices, case.weights, case.biases)
        assert (u.shape, a.shape) == ((0, F_), (0, F_))
        assert launch.linear(case.x, case.slices, case.weights, []).shape == (0, F_)
        assert launch.input_gradient(case.dy, None, case.slices, case.weights).shape == (0, D)
        d_weights, d_biases = weight_gradient([case.dy], None, case.x, case.slices, True)
    assert all(not gradient.any() for gradient in (*d_weights, *d_biases))  # zeros, not memory as it was found


@given(lengths=lengths_of_experts)
@settings(max_examples=4, deadline=None)
def test_any_slices(lengths: list[int]) -> None:
    with small_tiles():
        check_ffn(build_slices(lengths), torch.float32)


@pytest.mark.slow
@given(lengths=lengths_of_experts, hidden=st.integers(1, 40), ffn_hidden=st.integers(8, 40))
@settings(max_examples=40, deadline=None)
def test_any_slices_and_widths(lengths: list[int], hidden: int, ffn_hidden: int) -> None:
    with small_tiles():
        check_ffn(build_slices(lengths), torch.float32, hidden, ffn_hidden)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_shipped_tiles(architecture: int, dtype: torch.dtype) -> None:
    for choice in range(4):

        def choose(kernel: object, _: int, dtype: torch.dtype, choice: int = choice) -> list[MatmulTiles]:
            tiles = choose_tiles(kernel, architecture, dtype)
            return tiles[min(choice, len(tiles) - 1) :]

        with interpreted(), mock.patch.object(launch, "choose_tiles", choose):
            check_ffn([(0, 130), (130, 131)], dtype, hidden=136, ffn_hidden=144)


@pytest.mark.gpu
@pytest.mark.parametrize("widths", [(12, 20), (136, 144), (768, 3072), (1408, 6144)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    """Runs the whole FFN on a GPU."""
    for slices in ([(0, 300), (300, 301), (301, 460)], [(0, 0), (0, 200), (200, 200)]):
        check_ffn(slices, dtype, *widths, device="cuda")
