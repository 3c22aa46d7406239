"""Tests that the op for queries, keys and values equals its reference, and equals three layers bit for bit."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from beit3_ds.kernels.ops import multiway_qkv as module
from beit3_ds.kernels.ops.multiway_linear import multiway_linear
from beit3_ds.kernels.ops.multiway_qkv import multiway_qkv, multiway_qkv_reference
from beit3_ds.kernels.triton import multiway_qkv_launch, weight_gradient_launch
from tests.kernels.experts import Slices, build_slices
from tests.kernels.ffn_operators import CPU, check_device_implementation, check_wrong_launch_is_found
from tests.kernels.interpreter import interpreted


def problem(lengths: list[int], dtype: torch.dtype = torch.float64, width: int = 3) -> tuple:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()

    number = 3 * len(lengths)
    weights, biases = [draw(width + 2, width) for _ in range(number)], [draw(width + 2) for _ in range(number)]
    return draw(sum(lengths), width), build_slices(lengths), weights, biases


def results(op: object, x: Tensor, slices: Slices, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """Returns the outputs, and the gradients of all inputs for different gradients of the outputs."""
    outputs = op(x, slices, weights, biases)  # type: ignore[operator]
    upstream = [torch.linspace(-1, layer, y.numel(), dtype=y.dtype).view_as(y) for layer, y in enumerate(outputs)]
    return [*outputs, *torch.autograd.grad(outputs, [x, *weights, *biases], upstream)]


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_equals_reference(lengths: list[int]) -> None:
    inputs = problem(lengths)
    for ours, expected in zip(*(results(op, *inputs) for op in (multiway_qkv, multiway_qkv_reference)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [50, 1300])
def test_a_cpu_adds_up_as_three_layers_do(rows: int, dtype: torch.dtype) -> None:
    """Catches a changed order of sums, which would change every run on a CPU."""
    inputs = problem([rows, 40], dtype, width=64)

    def three_layers(x: Tensor, slices: Slices, weights: list[Tensor], biases: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(multiway_linear(x, slices, weights[i : i + 2], biases[i : i + 2]) for i in (0, 2, 4))

    assert all(map(torch.equal, results(multiway_qkv, *inputs), results(three_layers, *inputs)))


def test_gradcheck() -> None:
    x, slices, weights, biases = problem([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, *p: multiway_qkv(x, slices, p[:9], p[9:]), (x, *weights, *biases))


OPERATORS = {
    "multiway_qkv": "MULTIWAY_QKV",
    "multiway_qkv_input_gradient": "QKV_INPUT_GRADIENT",
    "multiway_qkv_weight_gradient": "QKV_WEIGHT_GRADIENT",
}
"""Operators by name."""


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_a_device(name: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_implementation(module, name, OPERATORS[name], accepted, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_passes_right_kernels(dtype: torch.dtype) -> None:
    with interpreted():
        module.check_kernels(CPU, dtype)


@pytest.mark.parametrize(
    ("launches", "launch", "result"),
    [
        (multiway_qkv_launch, "qkv", "q"),
        (multiway_qkv_launch, "qkv_input_gradient", "dx"),
        (weight_gradient_launch, "weight_gradient", "dw q 0"),
    ],
)
def test_self_check_finds_wrong_kernels(
    launches: ModuleType, launch: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong_launch_is_found(module, launches, launch, result, monkeypatch)
