"""What happens when a kernel fails at its first use: a warning, and plain PyTorch in its place."""

import pytest
import torch

from beit3_ds.kernels.ops import packed_attention as module
from beit3_ds.kernels.ops.numerics import WrongResultError, check_rule
from beit3_ds.kernels.ops.packed_attention import check_kernels, packed_attention, packed_attention_reference
from beit3_ds.kernels.ops.self_check import passes

CPU = torch.device("cpu")


def test_a_right_kernel_passes(recwarn: pytest.WarningsRecorder) -> None:
    """The operator's own check, with the implementation for the CPU in the kernels' place."""
    assert passes("packed_attention", CPU, lambda: check_kernels(CPU, torch.float32, 8))
    assert not recwarn


def test_a_wrong_kernel_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = module._run_operator
    monkeypatch.setattr(module, "_run_operator", lambda *args, **kwargs: operator(*args, **kwargs) * 1.001)
    with pytest.warns(UserWarning, match=r"packed_attention in .* is switched off: WrongResultError: y: error .* > "):
        assert not passes("packed_attention in fp32", CPU, lambda: check_kernels(CPU, torch.float32, 8))


def test_a_kernel_that_does_not_compile_is_switched_off() -> None:
    def fail() -> None:
        raise RuntimeError("out of resource: shared memory")

    with pytest.warns(UserWarning, match="out of resource"):
        assert not passes("packed_attention", CPU, fail)


def test_the_plain_form_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check whose answer nobody heeds, and one that asks itself for ever."""
    asked = []
    monkeypatch.setattr(module, "_are_trusted", lambda *case: asked.append(case))
    monkeypatch.setattr(module, "_run_operator", lambda *args: pytest.fail("the kernels ran"))
    on_device = type("OnDevice", (), {"is_cuda": True, "device": CPU, "dtype": torch.float32, "shape": (4, 2, 8)})
    assert not module.runs_kernels(on_device)  # type: ignore[arg-type]
    assert asked == [(CPU, torch.float32, 8)]
    monkeypatch.setattr(module, "runs_kernels", lambda q: False)
    q = torch.randn(4, 2, 8)
    ranges = (((0, 3),), ((3, 4),))
    torch.testing.assert_close(packed_attention(q, q, q, ranges), packed_attention_reference(q, q, q, ranges))


def test_nan_breaks_the_rule() -> None:
    with pytest.raises(WrongResultError, match="y: error nan"):
        check_rule(("y",), (torch.tensor([torch.nan]),), lambda x: (x,), (torch.ones(1),))
    with pytest.raises(WrongResultError, match=r"y is torch.float32 \(1, 1\)"):
        check_rule(("y",), (torch.ones(1, 1),), lambda x: (x,), (torch.ones(1),))
