"""Products of the CPU, whichever library makes them."""

# R rows, D input width, F output width.

from unittest import mock

import pytest
import torch

from beit3_ds.kernels.cpu import matmul as native_product
from beit3_ds.kernels.cpu.matmul import product


def worst_error(rows: int, transposed: bool, with_bias: bool, dtype: torch.dtype = torch.float32) -> float:
    """Of `product` into memory that holds NaN, in roundings of the largest result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, 48), (48, 32) if transposed else (32, 48), (32,))
    x, w, b = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    w = w.t() if transposed else w
    out = torch.full((rows + 2, 32), torch.nan, dtype=dtype)
    result = product(x, w, b if with_bias else None, out[1:-1])
    assert torch.equal(result, out[1:-1]), "it is the memory that was given"
    assert bool(out[0].isnan().all()) and bool(out[-1].isnan().all()), "nothing else is written"
    truth = x.double() @ w.double().t() + (b.double() if with_bias else 0)
    return float((result - truth).abs().max() / truth.abs().max() / torch.finfo(dtype).eps) if rows else 0.0


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 1024, 1111])
def test_product_is_exact_to_its_dtype(rows: int, transposed: bool, with_bias: bool) -> None:
    assert worst_error(rows, transposed, with_bias) < 8
    assert worst_error(rows, transposed, with_bias, torch.float64) < 8


def test_many_rows_in_float32_go_to_onednn_alone() -> None:
    if not native_product._has_onednn():
        pytest.skip("this build of PyTorch has no oneDNN")
    with mock.patch.object(native_product, "_add_by_onednn") as onednn:
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


def test_without_onednn_mkl_serves() -> None:
    # Another PyTorch may know the operator by other arguments.
    native_product._has_onednn.cache_clear()
    with (
        mock.patch.object(native_product, "_add_by_onednn", side_effect=RuntimeError("no such operator")),
        pytest.warns(UserWarning, match="A product by oneDNN failed its check on cpu and is switched off"),
    ):
        assert worst_error(1111, True, True) < 8
    native_product._has_onednn.cache_clear()


@pytest.mark.parametrize("shape", [(1, 1), (513, 40), (1100, 768), (16, 2048), (33, 3000)])
def test_a_matrix_is_transposed_whole(shape: tuple[int, int]) -> None:
    """In strips, whose last may be narrower."""
    x = torch.randn(shape)
    result = native_product._transpose(x)
    assert result.is_contiguous() and torch.equal(result, x.t())
