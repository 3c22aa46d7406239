"""Tests the fake driver: it counts launches, compiles only on request, and leaves nothing behind."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops.multiway_layer_norm import multiway_layer_norm
from beit3_ds.kernels.ops.multiway_linear import KERNELS, multiway_linear
from beit3_ds.kernels.triton.architecture import architecture_of, is_on_gpu
from beit3_ds.kernels.triton.fake_driver import fake_gpu

CPU = torch.device("cpu")
SLICES = ((0, 5), (5, 8))


def _fail_inside() -> None:
    with fake_gpu(90, compiles=False):
        assert architecture_of(CPU) == 90
        raise RuntimeError("planted")


def _differentiate(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    x = torch.ones(8, 16, dtype=dtype, requires_grad=True)
    weights, biases = (
        [torch.ones(shape, dtype=dtype, requires_grad=True) for _ in SLICES] for shape in ((32, 16), (32,))
    )
    y = multiway_linear(x, SLICES, weights, biases)
    y.sum().backward()
    return y


def test_launches_are_counted_and_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with fake_gpu(90, compiles=False) as gpu:
        _differentiate()  # the first launches also choose tile sizes
        gpu.launches.clear()
        _differentiate()
    kernels = "projection_kernel", "input_gradient_kernel", "weight_gradient_kernel", "sum_kernel"
    assert gpu.launches == dict.fromkeys(kernels, 1)  # the last adds up the shares of the weight gradient
    assert not gpu.kernels
    assert not list(tmp_path.iterdir())


def test_kernels_are_compiled_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    x, parameter = torch.ones(8, 16, dtype=torch.bfloat16), torch.ones(16, dtype=torch.bfloat16)
    arguments = x, SLICES, [parameter] * 2, [parameter] * 2, 1e-5
    with fake_gpu(90, compiles=True) as gpu:
        multiway_layer_norm(*arguments)
    # The self-check runs both passes twice, and their kernels serve the call too.
    assert gpu.launches == {"forward_kernel": 3, "backward_kernel": 2, "sum_kernel": 2}
    assert len(gpu.kernels) == len(list(tmp_path.rglob("*.cubin"))) == 3
    before = sorted(tmp_path.rglob("*"))
    with fake_gpu(90, compiles=True) as second:
        multiway_layer_norm(*arguments)
    assert second.launches == gpu.launches  # the self-check ran again
    assert sorted(tmp_path.rglob("*")) == before  # all kernels were in the cache


def test_nothing_remains_outside() -> None:
    expected = _differentiate(torch.float32)
    with fake_gpu(100, compiles=False):
        assert is_on_gpu(torch.ones(1))
        assert architecture_of(CPU) == 100
        assert KERNELS.accept(torch.ones(1))
        with pytest.raises(RuntimeError, match="planted"):
            _fail_inside()
        assert architecture_of(CPU) == 100
    assert not is_on_gpu(torch.ones(1))
    assert not KERNELS.accept(torch.ones(1))
    torch.testing.assert_close(_differentiate(torch.float32), expected)
