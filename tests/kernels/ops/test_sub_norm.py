"""Tests the operators of the sub-LN; `test_out_projection.py` compares the sub-LN with LayerNorm."""

import pytest
import torch

from beit3_ds.kernels.ops import sub_norm as module
from beit3_ds.kernels.triton import sub_norm_launch
from tests.kernels.ffn_operators import CPU, check_device_implementation, check_operator, check_wrong_launch_is_found
from tests.kernels.interpreter import interpreted

DEVICE_FUNCTIONS = {
    "row_statistics": "_ROW_STATISTICS",
    "sub_norm": "_SUB_NORM",
    "sub_norm_sums": "_SUB_NORM_SUMS",
    "sub_norm_gradient": "_SUB_NORM_GRADIENT",
}
"""Operators, and the functions that compute them for CUDA tensors."""


@pytest.mark.parametrize("name", DEVICE_FUNCTIONS)
def test_opcheck(name: str) -> None:
    check_operator(name)


@pytest.mark.parametrize("accepted", [True, False])
@pytest.mark.parametrize("name", DEVICE_FUNCTIONS)
def test_launches_of_a_device(name: str, accepted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    check_device_implementation(module, name, DEVICE_FUNCTIONS[name], accepted, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_self_check_passes_right_kernels(dtype: torch.dtype) -> None:
    with interpreted():
        module.check_kernels(CPU, dtype)


@pytest.mark.parametrize(
    ("launch", "result"),
    [("row_statistics", "mean"), ("normalize", "n"), ("norm_gradient_sums", "sums"), ("norm_gradient", "dx")],
)
def test_self_check_finds_wrong_kernels(launch: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wrong_launch_is_found(module, sub_norm_launch, launch, result, monkeypatch)
