"""Tests that the multiway linear op equals its reference, also for experts without rows."""

from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops import multiway_linear as module
from beit3_ds.kernels.ops.multiway_linear import multiway_linear, multiway_linear_reference
from beit3_ds.kernels.triton import multiway_ffn_launch, weight_gradient_launch
from tests.kernels.ffn_operators import CPU, check_device_implementation, check_wrong_launch_is_found
from tests.kernels.interpreter import interpreted


def problem(lengths: list[int]) -> tuple:
    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)

    stops = torch.tensor(lengths).cumsum(0).tolist()
    slices = [(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
    weights, biases = [draw(5, 3) for _ in lengths], [draw(5) for _ in lengths]
    return draw(sum(lengths), 3), slices, weights, biases


@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_equals_reference(lengths: list[int]) -> None:
    x, slices, weights, biases = problem(lengths)
    leaves = [x, *weights, *biases]
    results = []
    for op in (multiway_linear, multiway_linear_reference):
        y = op(x, slices, weights, biases)
        weighted = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum()
        results.append([y, *torch.autograd.grad(weighted, leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_gradcheck() -> None:
    x, slices, weights, biases = problem([2, 0, 3])
    assert torch.autograd.gradcheck(lambda x, *p: multiway_linear(x, slices, p[:3], p[3:]), (x, *weights, *biases))


OPERATORS = {
    "multiway_linear": "MULTIWAY_LINEAR",
    "multiway_input_gradient": "MULTIWAY_INPUT_GRADIENT",
    "multiway_weight_gradient": "MULTIWAY_WEIGHT_GRADIENT",
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
        (multiway_ffn_launch, "linear", "y"),
        (multiway_ffn_launch, "input_gradient", "dx"),
        (weight_gradient_launch, "weight_gradient", "dw 0"),
    ],
)
def test_self_check_finds_wrong_kernels(
    launches: ModuleType, launch: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_wrong_launch_is_found(module, launches, launch, result, monkeypatch)
