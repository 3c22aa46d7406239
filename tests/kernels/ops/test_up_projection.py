"""Tests the up projection, alone and followed by the out projection."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops import out_projection as out_module
from beit3_ds.kernels.ops import up_projection as module
from beit3_ds.kernels.ops.out_projection import out_projection, out_projection_reference
from beit3_ds.kernels.ops.up_projection import up_projection
from beit3_ds.kernels.triton import multiway_ffn_launch
from tests.kernels.ffn_operators import (
    CPU,
    HIDDEN,
    WIDTH,
    Problem,
    check_device_implementation,
    check_wrong_launch_is_found,
)
from tests.kernels.interpreter import interpreted


@pytest.mark.parametrize("with_norm", [False, True])
def test_ffn_as_on_a_device(with_norm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the two projections as for CUDA tensors; catches an activation of other rows."""
    for op in (module, out_module):
        monkeypatch.setattr(op.KERNELS, "accept", lambda x: True)
    problem = Problem([3, 0, 2])
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(5, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    shapes = [(WIDTH, HIDDEN)] * 3 + [(WIDTH,)] * 3
    up = [torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    norm = problem.norm() if with_norm else None
    activation = up_projection(h, problem.slices, up[:3], up[3:], has_norm=with_norm)
    assert (activation.a_TF is None) == with_norm  # with a norm, one pass computes the GELU and the norm
    x = torch.cat([F.linear(h[i:j], up[k], up[3 + k]) for k, (i, j) in enumerate(problem.slices)])
    leaves = [h, *up, *problem.leaves[1 : None if with_norm else -6]]
    results = []
    given: tuple[tuple[Callable[..., Tensor], object], ...] = (
        (out_projection, activation),
        (out_projection_reference, x),
    )
    for op, start in given:
        linear = problem.parameters["weights"], problem.parameters["biases"]
        stream = {"residual_TD": problem.residual, "factor_T": problem.factor}
        y = op(start, problem.slices, *linear, gelu=True, norm=norm, **stream)
        upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * upstream).sum(), leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_up_projection() -> None:
    """Checks that the op applies only the linear layer on a CPU, while the operator also applies the GELU."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(5, WIDTH, generator=generator, dtype=torch.float64)
    weights = [torch.randn(8, WIDTH, generator=generator, dtype=h.dtype) for _ in range(2)]
    biases = [torch.randn(8, generator=generator, dtype=h.dtype) for _ in range(2)]
    expected = torch.cat([F.linear(h[:3], weights[0], biases[0]), F.linear(h[3:], weights[1], biases[1])])
    activation = up_projection(h, [(0, 3), (3, 5)], weights, biases, has_norm=True)
    torch.testing.assert_close(activation.x_TF, expected)
    x, a = module.UP_PROJECTION(h, (3, 5), weights, biases)
    for mine, theirs in zip((x, a), (expected, F.gelu(expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


OPERATORS = {"up_projection": "UP_PROJECTION"}
"""Operators by name."""


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_a_device(name: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_implementation(module, name, OPERATORS[name], accepted, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_passes_right_kernels(dtype: torch.dtype) -> None:
    with interpreted():
        module.check_kernels(CPU, dtype)


@pytest.mark.parametrize(("launch", "result"), [("up_projection", "x")])
def test_self_check_finds_wrong_kernels(launch: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wrong_launch_is_found(module, multiway_ffn_launch, launch, result, monkeypatch)
