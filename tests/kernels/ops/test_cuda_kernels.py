"""Tests calls of the CUDA C++ kernels; `tests/kernels/csrc` tests the kernels themselves."""

import itertools
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beit3_ds.kernels.ops import cuda_kernels
from beit3_ds.kernels.ops import packed_attention as attention_module
from beit3_ds.kernels.ops.attention_plan import plan_tiles
from beit3_ds.kernels.ops.cuda_kernels import MAX_EXPERTS, TILE_ROWS, check_grouped_gemm, is_built, plan_row_tiles
from beit3_ds.kernels.ops.measured_op import CHOICES
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.packed_attention import check_kernels, packed_attention_reference
from tests.kernels.csrc.emulated import SOURCES

CPU = torch.device("cpu")
on_a_device = pytest.mark.skipif(
    not is_built(), reason="the CUDA C++ kernels are not built: BEIT3_BUILD_CUDA=1 pip install --no-build-isolation ."
)


@given(st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 8))
def test_tiles_cover_every_row_once(lengths: list[int], tile_rows: int) -> None:
    bounds = [0, *itertools.accumulate(lengths)]
    slices = tuple(itertools.pairwise(bounds))
    tiles = plan_row_tiles(slices, tile_rows, CPU)
    assert tiles.dtype == torch.int32 and tiles.shape[1:] == (3,)
    rows = [(expert, row) for expert, first, stop in tiles.tolist() for row in range(first, stop)]
    assert rows == [(expert, row) for expert, (start, stop) in enumerate(slices) for row in range(start, stop)]
    assert all(0 < stop - first <= tile_rows for _, first, stop in tiles.tolist())


def test_constants_equal_those_in_the_source() -> None:
    """Catches tile sizes that differ from those of the kernel."""
    assert f"constexpr int kMaxExperts = {MAX_EXPERTS};" in (SOURCES / "arguments.h").read_text(encoding="utf-8")
    assert f"constexpr int kGroupedGemmTileRows = {TILE_ROWS};" in (SOURCES / "launch.h").read_text(encoding="utf-8")


def test_operator_takes_the_kernel_that_was_chosen() -> None:
    """Checks that the C++ kernel gets every argument of the operator, and runs only if it was chosen."""
    q, k, v = torch.randn(3, 9, 1, 8).unbind()
    plan = plan_tiles((((0, 9),),), 64, CPU)
    results, arguments = (torch.ones_like(q), torch.zeros(1, 9)), (q, k, v, *plan, 64, True)
    for module, name, cuda_cpp in (
        (cuda_kernels, "packed_attention_forward", True),
        (attention_module, "_FORWARD", False),
    ):
        on_gpu = mock.patch.object(attention_module, "is_on_gpu", return_value=True)
        with on_gpu, mock.patch.object(module, name, return_value=results) as kernel:
            y = attention_module.PackedAttention.apply(q, k, v, plan, 64, True, cuda_cpp)
        assert y is results[0]
        kernel.assert_called_once_with(*arguments)


@pytest.mark.parametrize(
    ("backend", "dtype", "is_built", "is_trusted", "runs"),
    [
        ("cuda", torch.bfloat16, True, True, "cuda"),
        ("cuda", torch.bfloat16, True, False, "triton"),
        ("cuda", torch.bfloat16, False, True, "triton"),
        ("cuda", torch.float32, True, True, "triton"),  # the C++ kernel knows half precision only
        ("triton", torch.bfloat16, True, True, "triton"),
        ("library", torch.bfloat16, True, True, "varlen"),
        ("library", torch.float32, True, True, "library"),
    ],
)
def test_kernels_need_their_own_check(
    backend: str, dtype: torch.dtype, is_built: bool, is_trusted: bool, runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a setting without effect, and a C++ kernel that runs unchecked or after a failed check."""
    ran = []

    def are_trusted(device: torch.device, dtype: torch.dtype, head_size: int, cuda_cpp: bool = False) -> bool:
        return is_trusted or not cuda_cpp

    op = attention_module._ATTENTION
    implementations = {name: lambda *_, name=name: ran.append(name) for name in op._implementations}
    monkeypatch.setattr(op, "_implementations", implementations)
    for known in ("_chosen", "_recent"):
        monkeypatch.setattr(op, known, {})
    monkeypatch.setattr(CHOICES, "backend", backend)
    monkeypatch.setattr(cuda_kernels, "is_built", lambda: is_built)
    for kernels in (attention_module.KERNELS, attention_module.VARLEN):
        monkeypatch.setattr(kernels, "are_trusted", are_trusted)
    properties = {"is_cuda": True, "device": CPU, "dtype": dtype, "shape": (4, 2, 8), "requires_grad": False}
    q = type("OnDevice", (), {**properties, "numel": lambda: 64})
    attention_module.packed_attention(q, q, q, (((0, 4),),))  # type: ignore[arg-type]
    assert ran == [runs]


def test_gradients_do_not_depend_on_the_choice() -> None:
    """Catches a backward pass that returns fewer gradients than the operator has arguments."""
    ranges = (((0, 5), (7, 9)), ((5, 7),))
    inputs = torch.randn(4, 9, 2, 8).unbind()
    ours, reference = (
        with_gradients(partial(attention, ranges=ranges, causal_captions=True))
        for attention in (partial(attention_module._run_operator, cuda_cpp=True), packed_attention_reference)
    )
    check_against_reference(("y", "dq", "dk", "dv"), ours(*inputs), reference, inputs)


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grouped_gemm_on_a_device(dtype: torch.dtype) -> None:
    check_grouped_gemm(torch.device("cuda", 0), dtype)
    x = torch.zeros(0, 8, device="cuda", dtype=dtype)
    u, a = cuda_kernels.grouped_gemm(x, ((0, 0),), [x.new_zeros(16, 8)], [x.new_zeros(16)], gelu=True)
    assert u.shape == a.shape == (0, 16)


@pytest.mark.gpu
@on_a_device
def test_grouped_gemm_of_misaligned_parameters_on_a_device() -> None:
    """Checks weights and biases inside a flat buffer, as ZeRO-3 gathers them."""
    flat = torch.randn(16 * 8 + 16 + 1, device="cuda", dtype=torch.bfloat16)[1:]
    weight, bias = flat[:128].view(16, 8), flat[128:]
    x = torch.randn(5, 8, device="cuda", dtype=torch.bfloat16)
    u, _ = cuda_kernels.grouped_gemm(x, ((0, 5),), [weight], [bias], gelu=False)
    torch.testing.assert_close(u, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.gpu
@on_a_device
@pytest.mark.parametrize("head_size", [8, 40, 64, 88, 96, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_on_a_device(dtype: torch.dtype, head_size: int) -> None:
    check_kernels(torch.device("cuda", 0), dtype, head_size, cuda_cpp=True)
