"""Tests that the out projection equals its reference, forward and backward, also when ranks divide the rows."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops import out_projection as module
from beit3_ds.kernels.ops.out_projection import out_projection, out_projection_reference
from beit3_ds.kernels.ops.up_projection import Activation
from beit3_ds.kernels.triton import multiway_ffn_launch
from tests.kernels.ffn_operators import (
    CPU,
    Problem,
    check_device_implementation,
    check_wrong_launch_is_found,
)
from tests.kernels.interpreter import interpreted

LENGTHS = st.lists(st.integers(0, 4), min_size=1, max_size=3)


@given(
    lengths=LENGTHS,
    gelu=st.booleans(),
    with_norm=st.booleans(),
    by_operators=st.booleans(),
    chunk_rows=st.sampled_from([1, 3, 512]),
)
@settings(max_examples=60, deadline=None)
def test_equals_reference(lengths: list[int], gelu: bool, with_norm: bool, by_operators: bool, chunk_rows: int) -> None:
    """Catches a wrong expert, a factor on the residual, a bias added twice, and statistics of the wrong rows.

    Also catches gradients of the last row block only.
    """
    problem = Problem(lengths)
    expected = problem.run(out_projection_reference, gelu, problem.norm() if with_norm else None)
    with mock.patch.object(module, "_MATMUL_ROWS", chunk_rows):
        ours = problem.run(out_projection, gelu, problem.norm(by_operators) if with_norm else None)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("by_operators", [False, True])
def test_gradcheck(gelu: bool, by_operators: bool) -> None:
    problem = Problem([3, 0, 2])

    def call(x: Tensor, residual: Tensor, *p: Tensor) -> Tensor:
        norm = problem.norm(by_operators)._replace(scales=p[6:9], shifts=p[9:12])
        stream = {"residual_TD": residual, "factor_T": problem.factor}
        return out_projection(Activation(x), problem.slices, p[:3], p[3:6], gelu=gelu, norm=norm, **stream)

    assert torch.autograd.gradcheck(call, problem.leaves)


@pytest.mark.parametrize("by_operators", [False, True])
def test_a_float32_stream_beside_bf16_branches(by_operators: bool) -> None:
    """Catches a stream, or a gradient of the stream, that is rounded to bf16; a branch's gradient must be bf16."""
    problem, exact = Problem([5, 0, 4], torch.bfloat16), Problem([5, 0, 4])
    for mine, theirs in zip(exact.leaves, problem.leaves, strict=True):
        with torch.no_grad():
            mine.copy_(theirs)
    problem.residual = (problem.residual.detach().float() + 1e-4).requires_grad_()
    with torch.no_grad():
        exact.residual.copy_(problem.residual)
    problem.leaves[1], problem.factor, exact.factor = problem.residual, problem.factor.float(), problem.factor.double()
    y, dx, d_residual, *rest = problem.run(out_projection, True, problem.norm(by_operators))
    expected = exact.run(out_projection_reference, True, exact.norm())
    assert (y.dtype, d_residual.dtype) == (torch.float32, torch.float32)
    assert {gradient.dtype for gradient in (dx, *rest)} == {torch.bfloat16}
    dropped = problem.factor == 0
    assert dropped.any() and torch.equal(y[dropped], problem.residual[dropped])
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
    torch.testing.assert_close(d_residual.double(), upstream, rtol=1e-6, atol=1e-7)
    for found, truth in zip((y, dx, *rest), (expected[0], expected[1], *expected[3:]), strict=True):
        assert (found.double() - truth).norm() <= 0.02 * truth.norm() + 1e-6


def test_large_means_cancel_nothing() -> None:
    """Catches E[x^2] - E[x]^2, which has no correct digit in float32 for a mean of 3000 and a variance of 1."""
    problem = Problem([40, 24], torch.float32)
    with torch.no_grad():
        problem.x += 3000
    exact = Problem([40, 24])
    exact.factor = problem.factor.double()
    for mine, theirs in zip(exact.leaves, problem.leaves, strict=True):
        with torch.no_grad():
            mine.copy_(theirs)
    expected = exact.run(out_projection_reference, False, exact.norm())
    for by_operators in (False, True):
        for mine, theirs in zip(problem.run(out_projection, False, problem.norm(by_operators)), expected, strict=True):
            torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2)


def test_the_input_alone_is_saved() -> None:
    """Catches activations or normalised rows that autograd saves in addition to the input."""
    problem, kept = Problem([5, 3]), []
    pack = lambda tensor: kept.append(tensor) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        problem.run(out_projection, True, problem.norm())
    wide = [tensor for tensor in kept if tensor.shape == problem.x.shape]
    assert len(wide) == 1 and wide[0].data_ptr() == problem.x.data_ptr()


OPERATORS = {"out_projection": "OUT_PROJECTION"}
"""Operators by name."""


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_a_device(name: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_implementation(module, name, OPERATORS[name], accepted, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_passes_right_kernels(dtype: torch.dtype) -> None:
    with interpreted():
        module.check_kernels(CPU, dtype)


@pytest.mark.parametrize(("launch", "result"), [("out_projection", "y")])
def test_self_check_finds_wrong_kernels(launch: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wrong_launch_is_found(module, multiway_ffn_launch, launch, result, monkeypatch)
