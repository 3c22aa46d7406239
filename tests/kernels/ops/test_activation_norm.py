"""Tests GELU and sub-LN in one pass: the operators, and their kernels in the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_ds.kernels.ops import activation_norm as module
from beit3_ds.kernels.ops.numerics import check_against_reference
from beit3_ds.kernels.triton import multiway_layer_norm_launch as launch
from beit3_ds.kernels.triton.expert_rows_launch import RowTiling, choose_row_tiling
from tests.kernels.experts import DTYPES, EPSILON, Case, Slices, any_case
from tests.kernels.ffn_operators import CPU, check_device_implementation, check_wrong_launch_is_found
from tests.kernels.interpreter import interpreted

OPERATORS = {"activation_norm": "ACTIVATION_NORM", "activation_norm_backward": "ACTIVATION_NORM_BACKWARD"}
"""Operators by name."""


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("name", OPERATORS)
def test_launches_of_a_device(name: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_implementation(module, name, OPERATORS[name], accepted, monkeypatch)


@pytest.mark.parametrize("gelu", [False, True])
def test_operators_equal_autograd(gelu: bool) -> None:
    """Catches rows, statistics or parameters of another expert, and a gradient without the GELU."""
    case = Case([(0, 3), (3, 3), (3, 8)], torch.float64, 12, 12)
    leaves = [x.requires_grad_() for x in (case.x, *case.scales, *case.shifts)]
    expected = case.layer_norm(F.gelu(case.x) if gelu else case.x, case.scales, case.shifts)
    gradients = torch.autograd.grad(expected, leaves, case.dy)
    x, *parameters = (leaf.detach() for leaf in leaves)
    ends = (3, 3, 8)
    n, statistics = module.ACTIVATION_NORM(x, gelu, parameters[:3], parameters[3:], EPSILON, ends)
    dx, d_parameters = module.ACTIVATION_NORM_BACKWARD(case.dy.clone(), x, gelu, statistics, parameters[:3], ends)
    for ours, theirs in zip((n, dx, *d_parameters.flatten(0, 1)), (expected, *gradients), strict=True):
        torch.testing.assert_close(ours, theirs)


def check_launches(case: Case, gelu: bool, tiling: RowTiling) -> None:
    """Checks the kernels in the interpreter or on the case's device."""
    ends, experts = [stop for _, stop in case.slices], len(case.slices)
    n, statistics = launch.forward(case.x, ends, case.scales, case.shifts, EPSILON, tiling, gelu)
    dn = case.dy.clone()
    dx, d_parameters = launch.backward(dn, None, case.x, statistics, ends, case.scales, tiling, gelu, in_place=True)
    assert dx.data_ptr() == dn.data_ptr()

    def reference(x: Tensor, dy: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, *parameters)]
        a = F.gelu(leaves[0]) if gelu else leaves[0]
        y = case.layer_norm(a, leaves[1 : 1 + experts], leaves[1 + experts :])
        gradients = torch.autograd.grad(y, leaves, dy)
        return y.detach(), *gradients

    results = (n, dx, *d_parameters.flatten(0, 1))
    names = ("n", "dx", *["d_scale"] * experts, *["d_shift"] * experts)
    check_against_reference(names, results, reference, (case.x, case.dy, *case.scales, *case.shifts))


@any_case
@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
def test_kernels_follow_the_reference(gelu: bool, dtype: torch.dtype, slices: Slices) -> None:
    with interpreted():
        check_launches(Case(slices, dtype, 20, 20), gelu, RowTiling(1, 2, 5, 5))


def test_shipped_tiles() -> None:
    with interpreted():
        check_launches(Case([(0, 2), (2, 3)], torch.bfloat16, 6144, 6144), True, choose_row_tiling(90, 6144))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_passes_right_kernels(dtype: torch.dtype) -> None:
    with interpreted():
        module.check_kernels(CPU, dtype)


@pytest.mark.parametrize(("wrong", "result"), [("forward", "n"), ("backward", "dx")])
def test_self_check_finds_wrong_kernels(wrong: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wrong_launch_is_found(module, launch, wrong, result, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [20, 768, 3072, 6144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, width: int) -> None:
    case = Case([(0, 300), (300, 301), (301, 460)], dtype, width, width, "cuda")
    for gelu in (False, True):
        check_launches(case, gelu, choose_row_tiling(90, width))
