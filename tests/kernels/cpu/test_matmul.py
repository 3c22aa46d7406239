"""Tests that matrix products on a CPU are as exact as their dtype allows, with every library."""

# R rows, D input width, F output width.

from unittest import mock

import pytest
import torch

from beit3_ds.kernels.cpu import matmul as module
from beit3_ds.kernels.cpu.matmul import matmul
from beit3_ds.kernels.ops.self_check import TrustedKernels


def worst_error(rows: int, transposed: bool, with_bias: bool, dtype: torch.dtype = torch.float32) -> float:
    """Returns the error of `matmul` into memory filled with NaN, in units of rounding of the largest result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 48), (48, 32) if transposed else (32, 48), (32,))
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    w = w.t() if transposed else w
    out = torch.full((rows + 2, 32), torch.nan, dtype=dtype)
    result = matmul(x, w, b if with_bias else None, out[1:-1])
    assert torch.equal(result, out[1:-1]), "the result must be in the given memory"
    assert bool(out[0].isnan().all()) and bool(out[-1].isnan().all()), "nothing else may be written"
    truth = x.double() @ w.double().t() + (b.double() if with_bias else 0)
    return float((result - truth).abs().max() / truth.abs().max() / torch.finfo(dtype).eps) if rows else 0.0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 1024, 1111])
def test_matmul_is_exact_to_its_dtype(rows: int, transposed: bool, with_bias: bool) -> None:
    assert worst_error(rows, transposed, with_bias) < 8
    assert worst_error(rows, transposed, with_bias, torch.float64) < 8


def test_many_rows_in_float32_go_to_onednn_alone() -> None:
    if not module._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    with mock.patch.object(module, "_add_by_onednn") as onednn:
        for rows, transposed, dtype in (
            (255, False, torch.float32),
            (1023, True, torch.float32),
            (2000, False, torch.float64),
            (2000, False, torch.bfloat16),
        ):
            worst_error(rows, transposed, True, dtype)
        assert not onednn.called
        for rows, transposed in ((256, False), (1024, True)):
            worst_error(rows, transposed, True)
        assert onednn.call_count == 2


def test_mkl_is_used_without_onednn() -> None:
    # Another version of PyTorch may give the operator other arguments.
    with (
        mock.patch.object(module, "_ONEDNN", TrustedKernels("matmul by oneDNN", module._check_onednn)),
        mock.patch.object(module, "_add_by_onednn", side_effect=RuntimeError("no such operator")),
        pytest.warns(
            UserWarning, match=r"matmul by oneDNN in torch.float32 failed its check on cpu and is switched off"
        ),
    ):
        assert worst_error(1111, True, True) < 8


@pytest.mark.parametrize("shape", [(1, 1), (513, 40), (1100, 768), (16, 2048), (33, 3000)])
def test_a_matrix_is_transposed_whole(shape: tuple[int, int]) -> None:
    """Catches a last, narrower strip of columns that is not copied."""
    x = torch.randn(shape)
    result = module._transpose(x)
    assert result.is_contiguous() and torch.equal(result, x.t())
