"""Tests that a kernel that fails at its first use is replaced by plain PyTorch, with a warning."""

from typing import Any

import pytest
import torch

from beit3_ds.kernels.ops.measured_op import CHOICES
from beit3_ds.kernels.ops.self_check import TrustedKernels, passes_check

CPU = torch.device("cpu")


def on_device(dtype: torch.dtype) -> Any:
    """Fakes a CUDA tensor by a CPU tensor with the same properties."""
    return type("OnDevice", (), {"is_cuda": True, "device": CPU, "dtype": dtype})


def test_check_runs_once_per_device_dtype_and_properties(recwarn: pytest.WarningsRecorder) -> None:
    """Catches a check result that is forgotten, and one that is shared between two widths."""
    checked = []
    kernels = TrustedKernels("op", lambda *arguments, **properties: checked.append((*arguments, properties)))
    for _ in range(2):
        assert kernels.accept(on_device(torch.float32))
        assert kernels.accept(on_device(torch.bfloat16), width=8, stream=torch.float32)
        assert kernels.are_trusted(CPU, torch.bfloat16, width=16, stream=torch.float32)
    widths = [{"width": width, "stream": torch.float32} for width in (8, 16)]
    assert checked == [(CPU, torch.float32, {}), *((CPU, torch.bfloat16, properties) for properties in widths)]
    assert not recwarn


def test_unsupported_tensors_are_not_checked() -> None:
    kernels = TrustedKernels("op", lambda *_: pytest.fail("the check ran"))
    assert not kernels.accept(torch.ones(1)) and not kernels.accept(on_device(torch.float64))


def test_failing_kernels_are_switched_off_with_one_warning() -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory")

    kernels = TrustedKernels("op", fail)
    with pytest.warns(UserWarning, match=r"op in torch.float16, width=8 failed .* off: RuntimeError: out of") as warned:
        assert not any(kernels.accept(on_device(torch.float16), width=8) for _ in range(2))
    assert len(warned) == 1


def test_checks_may_differentiate() -> None:
    """Catches a check that fails because it first runs in inference mode."""
    with torch.inference_mode():
        leaf_check = lambda: torch.ones(1, requires_grad=True).sum().backward()  # noqa: E731
        assert passes_check("op", CPU, leaf_check)


def test_checks_run_the_kernels_themselves() -> None:
    """Catches a check of Triton's kernels that takes measurements, and then checks a library."""
    backends = []
    kernels = TrustedKernels("op", lambda *_: backends.append(CHOICES.backend))
    assert kernels.accept(on_device(torch.float32)) and backends == ["triton"] and CHOICES.backend == "auto"


def test_checks_run_with_their_device_as_the_current_one(two_gpus: list[int]) -> None:
    """Catches a check that runs on the first GPU for kernels of the second, where it would fail."""
    current = list[int]()
    assert TrustedKernels("op", lambda *_: current.append(two_gpus[-1])).are_trusted(
        torch.device("cuda:1"), torch.float32
    )
    assert current == [1] and two_gpus == [0]
