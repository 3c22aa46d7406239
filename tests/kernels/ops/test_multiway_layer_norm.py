"""Tests that the multiway LayerNorm equals its reference, in plain PyTorch and by its operators."""

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops import multiway_layer_norm as module
from beit3_ds.kernels.ops.measured_op import CHOICES, Backend
from beit3_ds.kernels.ops.multiway_layer_norm import check_kernels, multiway_layer_norm, multiway_layer_norm_reference
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference, with_gradients
from beit3_ds.kernels.triton.expert_rows_launch import RowTiling
from beit3_ds.kernels.triton.multiway_layer_norm_launch import backward, forward
from tests.kernels.ffn_operators import select_on_cpu
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
EPSILON = 1e-5
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL = RowTiling(num_warps=1, num_stages=2, forward_programs=4, backward_programs=5)
"""Tiling with one or two programs per expert, each with many rows."""


def build_slices(lengths: Sequence[int]) -> list[tuple[int, int]]:
    stops = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]


class Case:
    """Holds rows, parameters and gradients of the two outputs, with the results of the reference."""

    def __init__(
        self,
        lengths: Sequence[int],
        width: int,
        dtype: torch.dtype,
        device: str = "cpu",
        stream: torch.dtype | None = None,
    ) -> None:
        stream = stream or dtype
        self.slices, self.experts = build_slices(lengths), len(lengths)
        generator = torch.Generator().manual_seed(sum(lengths) + width)
        rows = torch.randn(3, sum(lengths), width, generator=generator)
        rows[0] += 3  # a mean that a kernel must subtract before it squares
        self.x, self.d_stream, self.dh = rows[0].to(stream), rows[1].to(stream), rows[2].to(dtype)
        self.x, self.d_stream, self.dh = (x.to(device) for x in (self.x, self.d_stream, self.dh))
        self.parameters = torch.randn(2 * self.experts, width, generator=generator).to(device, dtype).unbind()

    def weights_and_biases(self, parameters: Sequence[torch.Tensor]) -> tuple:
        return parameters[: self.experts], parameters[self.experts :]

    def apply(self, op, with_stream: bool, *leaves: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Returns the two outputs in one tensor, or h alone, so that the stream gets no gradient."""
        outputs = op(leaves[0], self.slices, *self.weights_and_biases(leaves[1:]), EPSILON)
        return torch.stack(outputs) if with_stream else outputs[1]

    def inputs(self, with_stream: bool) -> tuple[torch.Tensor, ...]:
        return self.x, *self.parameters, torch.stack((self.d_stream, self.dh)) if with_stream else self.dh

    def check(self, results: Sequence[torch.Tensor], with_stream: bool) -> None:
        """Checks the error bounds of outputs and gradients."""
        names = ("y", "dx", *(f"d_parameter_{i}" for i in range(len(self.parameters))))
        y, dx, *of_parameters = (result.dtype for result in results)
        assert (y, dx) == (self.x.dtype if with_stream else self.dh.dtype, self.x.dtype)
        assert set(of_parameters) == {self.dh.dtype}
        reference = with_gradients(partial(self.apply, multiway_layer_norm_reference, with_stream))
        check_against_reference(names, results, reference, self.inputs(with_stream))

    def interpret(self, tiling: RowTiling, with_stream: bool) -> tuple[torch.Tensor, ...]:
        """Runs the kernels in Triton's interpreter."""
        stops = [stop for _, stop in self.slices]
        weights, biases = self.weights_and_biases(self.parameters)
        with interpreted():
            h, statistics = forward(self.x, stops, weights, biases, EPSILON, tiling)
            d_stream = self.d_stream if with_stream else None
            dx, d_parameters = backward(self.dh, d_stream, self.x, statistics, stops, weights, tiling)
        return torch.stack((self.x, h)) if with_stream else h, dx, *d_parameters.flatten(0, 1)

    def differentiate(self, op, with_stream: bool) -> tuple[torch.Tensor, ...]:  # type: ignore[no-untyped-def]
        return with_gradients(partial(self.apply, op, with_stream))(*self.inputs(with_stream))


def operator(x, slices, weights, biases, epsilon):  # type: ignore[no-untyped-def]
    """Calls the operators as for CUDA tensors, in their CPU implementation."""
    stops = tuple(stop for _, stop in slices)
    return module._MultiwayLayerNorm.apply(x, stops, epsilon, True, *weights, *biases)


@given(
    lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    with_stream=st.booleans(),
    op=st.sampled_from([multiway_layer_norm, operator]),
)
@settings(max_examples=40, deadline=None)
def test_equals_reference(lengths, with_stream, op) -> None:  # type: ignore[no-untyped-def]
    case = Case(lengths, 5, torch.float64)
    results = case.differentiate(op, with_stream)
    expected = case.differentiate(multiway_layer_norm_reference, with_stream)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(70,), (40, 0, 30)])
def test_plain_form_stays_within_its_error_bound(lengths: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(lengths, 24, dtype)
    for with_stream in (False, True):
        case.check(case.differentiate(multiway_layer_norm, with_stream), with_stream)


@pytest.mark.parametrize("with_stream", [False, True])
def test_a_float32_stream_beside_bf16_parameters(with_stream: bool) -> None:
    """Catches statistics of rounded rows, and a rounded gradient of the stream."""
    case = Case((9, 0, 7), 24, torch.bfloat16, stream=torch.float32)
    for results in (
        case.interpret(SMALL, with_stream),
        case.differentiate(multiway_layer_norm, with_stream),
        case.differentiate(operator, with_stream),
    ):
        case.check(results, with_stream)
    check_kernels(CPU, torch.bfloat16, 24, torch.float32)


@pytest.mark.parametrize("op", [multiway_layer_norm_reference, multiway_layer_norm, operator])
def test_gradcheck(op) -> None:  # type: ignore[no-untyped-def]
    case = Case((2, 0, 3), 4, torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.x, *case.parameters)]
    for with_stream in (False, True):
        assert torch.autograd.gradcheck(partial(case.apply, op, with_stream), leaves)


def test_the_stream_is_passed_through() -> None:
    """Catches a copy of the stream, and missing gradients of the norm's parameters if only the stream is used."""
    case = Case((2, 3), 4, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (case.x, *case.parameters)]
    stream, _ = multiway_layer_norm(leaves[0], case.slices, *case.weights_and_biases(leaves[1:]), EPSILON)
    assert stream.data_ptr() == leaves[0].data_ptr()
    dx, *rest = torch.autograd.grad(stream, leaves, case.d_stream)
    assert torch.equal(dx, case.d_stream)
    assert not any(gradient.any() for gradient in rest)


def test_an_absent_gradient_stays_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    backward, given = module._backward_plain, []
    monkeypatch.setattr(module, "_backward_plain", lambda *args: given.append(args[1]) or backward(*args))
    case = Case((2, 3), 4, torch.float32)
    case.differentiate(multiway_layer_norm, with_stream=False)
    assert given == [None]


def test_given_gradients_are_not_modified() -> None:
    """Catches an addition in place to the residual's gradient, which the branch uses too."""
    for lengths in ((5,), (2, 3)):
        case = Case(lengths, 4, torch.float32)
        before = case.d_stream.clone(), case.dh.clone()
        case.differentiate(multiway_layer_norm, with_stream=True)
        stops = [stop for _, stop in case.slices]
        weights, biases = case.weights_and_biases(case.parameters)
        _, *statistics = module._forward_plain(case.x, stops, weights, biases, EPSILON)
        module._backward_plain(case.dh, case.d_stream, case.x, statistics, stops, weights)
        assert torch.equal(case.d_stream, before[0])
        assert torch.equal(case.dh, before[1])


def test_saves_the_parameters_themselves() -> None:
    """Catches a saved view or cast: ZeRO-3 replaces a parameter's storage before the backward pass."""
    case = Case((2, 3), 4, torch.float32)
    x, *parameters = (x.clone().requires_grad_() for x in (case.x, *case.parameters))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _output = multiway_layer_norm(x, case.slices, *case.weights_and_biases(parameters), EPSILON)
    assert all(any(t is weight for t in saved) for weight in parameters[:2])
    assert sorted(t.numel() for t in saved) == [2, 2, 3, 3, 4, 4, 20]  # x and two numbers per row, not h


@pytest.mark.parametrize("backend", ["triton", "library"])
def test_launches_of_a_device(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches arguments that the operators' CUDA implementations swap."""
    case = Case((2, 0, 3), 24, torch.float32)
    stops = tuple(stop for _, stop in case.slices)
    weights, biases = case.weights_and_biases(case.parameters)
    for measured in (module._FORWARD, module._BACKWARD):
        select_on_cpu(measured, monkeypatch)
    with interpreted(), CHOICES.fixed(backend):
        h, statistics = module._FORWARD(case.x, stops, weights, biases, EPSILON)
        dx, d_parameters = module._BACKWARD(case.dh, case.d_stream, case.x, statistics, stops, weights)
    case.check((torch.stack((case.x, h)), dx, *d_parameters.flatten(0, 1)), with_stream=True)


def test_self_check(recwarn: pytest.WarningsRecorder) -> None:
    check_kernels(CPU, torch.bfloat16, 24)
    assert not recwarn


@pytest.mark.parametrize("wrong", ["h", "statistics", "dx", "parameters"])
def test_self_check_finds_wrong_kernels(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu, backward_on_cpu = module._forward_library, module._backward_library

    def fail(name: str, x: torch.Tensor) -> torch.Tensor:
        return x * 1.001 if name == wrong else x

    def forward(*arguments):  # type: ignore[no-untyped-def]
        return tuple(map(fail, ("h", "statistics"), on_cpu(*arguments)))

    def backward(*arguments):  # type: ignore[no-untyped-def]
        return tuple(map(fail, ("dx", "parameters"), backward_on_cpu(*arguments)))

    monkeypatch.setattr(module, "_FORWARD", forward)
    monkeypatch.setattr(module, "_BACKWARD", backward)
    with pytest.raises(WrongResultError):
        check_kernels(CPU, torch.float32, 24)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [24, 768, 1024, 1408, 3072, 4096, 6144, 8192])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, width: int) -> None:
    """Runs the op on a GPU twice, because the backward pass must be deterministic."""
    for lengths in ((700, 0, 333), (1, 5), (3000,), (0, 0, 0)):
        case = Case(lengths, width, dtype, "cuda")
        assert module.runs_kernels(case.x, dtype)
        for with_stream in (False, True):
            first, second = (case.differentiate(multiway_layer_norm, with_stream) for _ in range(2))
            assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
            case.check(first, with_stream)
