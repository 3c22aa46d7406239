"""Tests launches that bypass Triton's binding: they run the variant that Triton would run.

Also tests which settings are chosen.
"""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.errors import TritonError

from beit3_ds.kernels.triton import fake_driver
from beit3_ds.kernels.triton.fake_driver import FakeGPU, fake_gpu
from beit3_ds.kernels.triton.kernel_launcher import KernelLauncher, Tuner, row_class

DTYPES = (torch.bfloat16, torch.float32)
NUM_STAGES = 2


@triton.jit(do_not_specialize=["first", "second"])
def _kernel(x_ptr, y_ptr, first, second, WIDTH: tl.constexpr, FLAG: tl.constexpr):
    pass


@pytest.fixture
def gpu() -> Iterator[FakeGPU]:
    with fake_gpu(90, compiles=False) as gpu:
        yield gpu


def _tensor(dtype: torch.dtype, offset: int) -> Tensor:
    """Returns a tensor whose address is `offset` elements above a multiple of 16 bytes."""
    return torch.zeros(64, dtype=dtype)[offset : offset + 8]


arguments = st.tuples(
    *(st.sampled_from(DTYPES) for _ in range(2)),
    *(st.sampled_from((0, 1, 16)) for _ in range(2)),
    *(st.sampled_from((0, 1, 16, 37)) for _ in range(2)),
    st.sampled_from((64, 96)),
    st.booleans(),
)


@given(launches=st.lists(arguments, min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_variants_are_those_of_triton(launches: list[tuple[Any, ...]]) -> None:
    """Catches dtypes, alignments, constants or devices that are missing from a variant's key."""
    launcher = KernelLauncher(_kernel)
    for _ in range(2):  # the second emulated GPU has variants of its own
        with fake_gpu(90, compiles=False), mock.patch.object(fake_driver._Launcher, "__call__", _record):
            for dtype_x, dtype_y, offset_x, offset_y, *numbers, width, flag in launches:
                tensors = _tensor(dtype_x, offset_x), _tensor(dtype_y, offset_y)
                CALLS.clear()
                launch = launcher.prepare((3, 2), numbers, (width, flag), num_warps=2, num_stages=NUM_STAGES)
                launch(*tensors)
                _kernel[(3, 2)](*tensors, *numbers, width, flag, num_warps=2, num_stages=NUM_STAGES)
                (ours, *ours_arguments), (of_triton, *triton_arguments) = CALLS
                assert ours is of_triton
                _check_arguments(ours_arguments, triton_arguments)


CALLS: list[tuple[Any, ...]] = []


def _record(self: Any, *arguments: Any) -> None:
    CALLS.append((self, *arguments))


def _check_arguments(ours: list[Any], of_triton: list[Any]) -> None:
    grid, stream, function, metadata = slice(0, 3), 3, 4, 5
    for part in (grid, stream, function, metadata):
        assert ours[part] == of_triton[part]
    for own, expected in zip(ours[9:], of_triton[9:], strict=True):  # between them are the hooks of a profiler
        assert _value(own) == _value(expected)


def _value(argument: Any) -> Any:
    """Returns an argument as a kernel gets it: Triton's launcher takes a tensor or its address."""
    return argument.data_ptr() if isinstance(argument, Tensor) else argument


def test_repeated_launches_bypass_triton(gpu: FakeGPU) -> None:
    launcher, tensors = KernelLauncher(_kernel), (_tensor(torch.bfloat16, 0),) * 2
    launcher.prepare((1,), (1, 2), (64, True), num_warps=4)(*tensors)
    with mock.patch.object(triton.JITFunction, "run", side_effect=AssertionError("Triton binds the arguments")):
        launcher.prepare((1,), (3, 4), (64, True), num_warps=4)(*tensors)
        with pytest.raises(AssertionError, match="Triton binds"):
            launcher.prepare((1,), (3, 4), (64, True), num_warps=8)(*tensors)
    assert gpu.launches == {"_kernel": 2}


def test_fastest_settings_are_chosen_for_every_case(gpu: FakeGPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a choice that two cases or devices share, and a choice that is measured again."""
    milliseconds = {"case a": {"slow": 2.0, "fast": 1.0}, "case b": {"slow": 1.0, "fast": 2.0}}
    tuner, timed = Tuner(), list[str]()

    def choose(case: str) -> str:
        def launch(setting: str) -> None:
            timed.append(setting)

        def benchmark(call: Any, **options: Any) -> float:
            call()
            return milliseconds[case][timed[-1]]

        monkeypatch.setattr(FakeGPU, "get_benchmarker", lambda self: benchmark)
        return tuner.choose((case,), lambda: ["slow", "fast"], launch)

    assert [choose(case) for case in ("case a", "case b", "case a", "case b")] == ["fast", "slow", "fast", "slow"]
    assert len(timed) == 4
    milliseconds["case a"] = {"slow": 1.0, "fast": 2.0}
    with fake_gpu(90, compiles=False):
        assert choose("case a") == "slow"
    assert choose("case a") == "fast"


def test_settings_that_do_not_fit_are_skipped(gpu: FakeGPU) -> None:
    def launch(setting: int) -> None:
        if setting < 3:
            raise TritonError(f"out of shared memory with {setting}")

    assert Tuner().choose(("case",), lambda: [1, 2, 3], launch) == 3
    with pytest.raises(TritonError, match="out of shared memory with 1"):
        Tuner().choose(("case",), lambda: [1, 2], launch)


def test_classes_of_rows() -> None:
    assert [row_class(rows) for rows in (1, 2048, 2049, 4096, 4097)] == [11, 11, 12, 12, 13]
