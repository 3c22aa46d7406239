"""Tests the operators of the sub-LN; `test_out_projection.py` compares the sub-LN with LayerNorm."""

import pytest
import torch

from beit3_ds.kernels.ops import sub_norm as module
from beit3_ds.kernels.triton import sub_norm_launch
from tests.kernels.ffn_operators import CPU, check_device_implementation, check_wrong_launch_is_found
from tests.kernels.interpreter import interpreted

OPERATORS = {
    "row_statistics": "ROW_STATISTICS",
    "sub_norm": "SUB_NORM",
    "sub_norm_sums": "SUB_NORM_SUMS",
    "sub_norm_gradient": "SUB_NORM_GRADIENT",
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
    ("launch", "result"),
    [("row_statistics", "mean"), ("normalize", "n"), ("norm_gradient_sums", "sums"), ("norm_gradient", "dx")],
)
def test_self_check_finds_wrong_kernels(launch: str, result: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_wrong_launch_is_found(module, sub_norm_launch, launch, result, monkeypatch)
