"""Tests packed attention by PyTorch's variable-length kernels, which need a GPU and are emulated here."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.kernels.ops import packed_attention as attention_module
from beit3_ds.kernels.ops.attention_plan import Ranges
from beit3_ds.kernels.ops.numerics import WrongResultError
from beit3_ds.kernels.ops.packed_attention import packed_attention_reference
from beit3_ds.kernels.ops.varlen_attention import plan_varlen, varlen_attention

CPU = torch.device("cpu")
PAIRS: Ranges = (((0, 3), (7, 9)), ((3, 5),), ((5, 7), (9, 10)))
IN_ORDER: Ranges = (((0, 3),), ((3, 3),), ((3, 10),))


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replaces PyTorch's operator by the documented computation on a CPU."""
    calls: list[Any] = []

    def varlen_attn(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        assert cu_q.dtype == cu_k.dtype == torch.int32 and max_q == max_k == int(cu_q.diff().max())
        calls.append(len(cu_q) - 1)
        ranges = tuple(((start, stop),) for start, stop in zip(cu_q.tolist(), cu_q.tolist()[1:], strict=False))
        return packed_attention_reference(q, k, v, ranges)

    module: Any = ModuleType("varlen")
    module.varlen_attn = varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    return calls


@pytest.mark.parametrize("ranges", [PAIRS, IN_ORDER])
def test_equals_the_reference(ranges: Ranges, emulated: list[Any]) -> None:
    """Catches rows of another sequence, and results that are not put back in the stream's order."""
    results = []
    leaf = torch.randn(10, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    for op in (varlen_attention, packed_attention_reference):
        y = op(*leaf.unbind(1), ranges)
        weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y)
        results.append([y, *torch.autograd.grad((y * weights).sum(), leaf)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert emulated == [3]


def test_rows_in_order_are_not_copied() -> None:
    assert plan_varlen(IN_ORDER, CPU).rows is None and plan_varlen(PAIRS, CPU).rows is not None


def test_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    attention_module.check_varlen(CPU, torch.float32, 8)
    wrong = lambda *arguments, **options: varlen_attention(*arguments, **options) * 1.001  # noqa: E731
    monkeypatch.setattr(attention_module, "varlen_attention", wrong)
    with pytest.raises(WrongResultError, match="y: error"):
        attention_module.check_varlen(CPU, torch.float32, 8)
