"""The FFN's ops prove their kernels at the first use: launches behind the operators, interpreted here."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops import multiway_linear, out_projection, sub_norm, up_projection
from beit3_ds.kernels.ops.numerics import WrongResultError
from beit3_ds.kernels.triton import multiway_ffn_launch, sub_norm_launch
from tests.kernels.interpreter import interpreted
from tests.kernels.ops.test_out_projection import operator_calls

CPU = torch.device("cpu")
OPS = {"multiway_linear": multiway_linear, "sub_norm": sub_norm, "up_projection": up_projection}
OPS |= {"out_projection": out_projection}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", OPS)
def test_right_kernels_pass(op: str, dtype: torch.dtype) -> None:
    with interpreted():
        OPS[op].check_kernels(CPU, dtype)


# The first result that a launch returns is made wrong by half a percent; the check has to name it.
WRONG = {
    ("multiway_linear", multiway_ffn_launch, "linear"): "y",
    ("multiway_linear", multiway_ffn_launch, "input_gradient"): "dx",
    ("multiway_linear", multiway_ffn_launch, "weight_gradient"): "dw 0",
    ("sub_norm", sub_norm_launch, "row_statistics"): "mean",
    ("sub_norm", sub_norm_launch, "normalize"): "n",
    ("sub_norm", sub_norm_launch, "norm_gradient_sums"): "sums",
    ("sub_norm", sub_norm_launch, "norm_gradient"): "dx",
    ("up_projection", multiway_ffn_launch, "up_projection"): "x",
    ("out_projection", multiway_ffn_launch, "out_projection"): "y",
}


@pytest.mark.parametrize(("op", "module", "launch"), WRONG)
def test_wrong_kernels_fail(op: str, module: Any, launch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check that does not look at one of the launches."""
    right = getattr(module, launch)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        first = next(flatten(result))
        first.mul_(1.005)
        return result

    monkeypatch.setattr(module, launch, wrong)
    expected = pytest.raises(WrongResultError, match=f"^{WRONG[op, module, launch]}: error")
    with interpreted(), expected:
        OPS[op].check_kernels(CPU, torch.float32)


ON_DEVICE = {
    "multiway_linear": (multiway_linear, "_linear_cuda"),
    "multiway_input_gradient": (multiway_linear, "_input_gradient_cuda"),
    "multiway_weight_gradient": (multiway_linear, "_weight_gradient_cuda"),
    "row_statistics": (sub_norm, "_row_statistics_cuda"),
    "sub_norm": (sub_norm, "_sub_norm_cuda"),
    "sub_norm_sums": (sub_norm, "_sub_norm_sums_cuda"),
    "sub_norm_gradient": (sub_norm, "_sub_norm_gradient_cuda"),
    "up_projection": (up_projection, "_up_projection_cuda"),
    "out_projection": (out_projection, "_out_projection_cuda"),
}


@pytest.mark.parametrize("trusted", [True, False])
@pytest.mark.parametrize("name", ON_DEVICE)
def test_operators_hand_on_what_launches_take(name: str, trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions that CUDA tensors reach, with kernels and, where these are switched off, without."""
    module, function = ON_DEVICE[name]
    if hasattr(module, "_runs_kernels"):
        monkeypatch.setattr(module, "_runs_kernels", lambda x: trusted)
    arguments = operator_calls(torch.float32)[name]
    expected = getattr(torch.ops.beit3_ds, name)(*arguments)
    with interpreted():
        ours = getattr(module, function)(*arguments)
    for mine, theirs in zip(flatten(ours), flatten(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def flatten(result: Any) -> Iterator[Tensor]:
    """All tensors of a nested result."""
    if isinstance(result, Tensor):
        yield result
    else:
        for part in result:
            yield from flatten(part)
