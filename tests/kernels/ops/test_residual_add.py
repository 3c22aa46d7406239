"""Tests that adding a branch to the residual stream equals the reference, in plain PyTorch and by operators."""

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops import residual_add as module
from beit3_ds.kernels.ops.measured_op import CHOICES, Backend
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference, with_gradients
from beit3_ds.kernels.ops.residual_add import check_kernels, residual_add, residual_add_reference
from beit3_ds.kernels.triton.expert_rows_launch import RowTiling
from beit3_ds.kernels.triton.residual_add_launch import backward, forward
from tests.kernels.ffn_operators import select_on_cpu
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = RowTiling(num_warps=1, num_stages=2, forward_programs=4, backward_programs=5)
"""Tiling with one or two programs per expert, each with many rows."""


class Case:
    """Holds a stream, a branch, biases, factors and a gradient, with the results of the reference."""

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        with_factor: bool,
        device: str = "cpu",
        stream: torch.dtype | None = None,
    ) -> None:
        stream = stream or dtype
        self.stops = tuple(sum(lengths[: i + 1]) for i in range(len(lengths)))
        self.slices = [(stop - length, stop) for stop, length in zip(self.stops, lengths, strict=True)]
        generator = torch.Generator().manual_seed(sum(lengths) + width)
        rows = torch.randn(3, sum(lengths), width, generator=generator)
        self.residual, self.partial, self.dy = rows[0].to(stream), rows[1].to(dtype), rows[2].to(stream)
        self.residual, self.partial, self.dy = (x.to(device) for x in (self.residual, self.partial, self.dy))
        self.biases = torch.randn(len(lengths), width, generator=generator).to(device, dtype).unbind()
        kept = torch.rand(sum(lengths), generator=generator)
        self.factor = torch.where(kept < 0.5, 0.0, 1 + kept).to(device, stream) if with_factor else None

    def apply(self, op: Callable[..., Tensor], residual: Tensor, partial: Tensor, *biases: Tensor) -> Tensor:
        factor = None if self.factor is None else self.factor.to(residual.dtype)
        return op(residual, partial, self.slices, biases, factor)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.residual, self.partial, *self.biases, self.dy

    def check(self, results: Sequence[Tensor]) -> None:
        """Checks the error bounds of outputs and gradients."""
        names = ("y", "d_residual", "d_partial", *(f"d_bias_{i}" for i in range(len(self.biases))))
        stream, dtype = self.residual.dtype, self.partial.dtype
        assert [result.dtype for result in results] == [stream, stream, dtype, *[dtype] * len(self.biases)]
        check_against_reference(
            names, results, with_gradients(partial(self.apply, residual_add_reference)), self.inputs
        )

    def interpret(self, tiling: RowTiling) -> tuple[Tensor, ...]:
        """Runs the kernels in Triton's interpreter."""
        with interpreted():
            y = forward(self.residual, self.partial, self.stops, self.biases, self.factor, tiling)
            d_partial, d_biases = backward(self.dy, self.stops, self.factor, tiling, self.partial.dtype)
        return y, self.dy, self.dy.to(self.partial.dtype) if self.factor is None else d_partial, *d_biases

    def differentiate(self, op: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return with_gradients(partial(self.apply, op))(*self.inputs)


def operator(residual, partial, slices, biases, factor):  # type: ignore[no-untyped-def]
    """Calls the operators as for CUDA tensors, in their CPU implementation."""
    stops = tuple(stop for _, stop in slices)
    return module._ResidualAdd.apply(residual, partial, factor, stops, True, *biases)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    with_factor=st.booleans(),
    op=st.sampled_from([residual_add, operator]),
)
@settings(max_examples=40, deadline=None)
def test_equals_reference(lengths, with_factor, op) -> None:  # type: ignore[no-untyped-def]
    case = Case(lengths, 5, torch.float64, with_factor)
    results, expected = case.differentiate(op), case.differentiate(residual_add_reference)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("op", [residual_add_reference, residual_add, operator])
def test_gradcheck(op: Callable[..., Tensor], with_factor: bool) -> None:
    case = Case((2, 0, 3), 4, torch.float64, with_factor)
    leaves = [x.clone().requires_grad_() for x in case.inputs[:-1]]
    assert torch.autograd.gradcheck(partial(case.apply, op), leaves)


@pytest.mark.parametrize("with_factor", [False, True])
def test_inputs_are_not_modified(with_factor: bool) -> None:
    """Catches an addition in place, and a gradient of the residual that is a copy of y's gradient."""
    case = Case((2, 3), 4, torch.float32, with_factor)
    before = [x.clone() for x in case.inputs]
    gradients = case.differentiate(residual_add)[1:]
    assert all(torch.equal(x, y) for x, y in zip(case.inputs, before, strict=True))
    assert gradients[0].data_ptr() == case.dy.data_ptr()
    assert (gradients[1].data_ptr() == case.dy.data_ptr()) != with_factor


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_launches_of_a_device(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches arguments that the operators' CUDA implementations swap."""
    case = Case((2, 0, 3), 24, torch.float32, with_factor=True)
    for measured in (module._FORWARD, module._BACKWARD):
        select_on_cpu(measured, monkeypatch)
    with interpreted(), CHOICES.fixed(backend):
        y = module._FORWARD(case.residual, case.partial, case.stops, case.biases, case.factor)
        d_partial, d_biases = module._BACKWARD(case.dy, case.stops, case.factor, case.partial.dtype)
    case.check((y, case.dy, d_partial, *d_biases))


def test_self_check(recwarn: pytest.WarningsRecorder) -> None:
    check_kernels(CPU, torch.bfloat16, 24)
    assert not recwarn


@pytest.mark.parametrize("wrong", ["y", "d_partial", "d_biases"])
def test_self_check_finds_wrong_kernels(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain_forward, plain_backward = module._forward_plain, module._backward_plain

    def fail(name: str, x: Tensor) -> Tensor:
        return x * 1.001 if name == wrong else x

    def forward(*arguments):  # type: ignore[no-untyped-def]
        return fail("y", plain_forward(*arguments))

    def backward(*arguments):  # type: ignore[no-untyped-def]
        return tuple(map(fail, ("d_partial", "d_biases"), plain_backward(*arguments)))

    monkeypatch.setattr(module, "_FORWARD", forward)
    monkeypatch.setattr(module, "_BACKWARD", backward)
    with pytest.raises(WrongResultError):
        check_kernels(CPU, torch.float32, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("width", [24, 768, 1024, 1408, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, width: int, with_factor: bool) -> None:
    """Runs the op on a GPU twice, because the backward pass must be deterministic."""
    for lengths in ((700, 0, 333), (1, 5), (3000,), (0, 0, 0)):
        case = Case(lengths, width, dtype, with_factor, "cuda")
        assert module.runs_kernels(case.residual, dtype)
        first, second = (case.differentiate(residual_add) for _ in range(2))
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
        case.check(first)
