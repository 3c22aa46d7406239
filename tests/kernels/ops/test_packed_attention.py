"""Tests that packed attention equals one softmax per sequence, for sequences of one or two row ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops import packed_attention as module
from beit3_ds.kernels.ops.attention_plan import plan_tiles
from beit3_ds.kernels.ops.measured_op import CHOICES
from beit3_ds.kernels.ops.numerics import WrongResultError
from beit3_ds.kernels.ops.packed_attention import PackedAttention, packed_attention, packed_attention_reference
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()
CPU = torch.device("cpu")


RANGES = (((0, 3),), ((3, 5), (7, 9)), ((5, 6), (9, 10)), ((6, 7),), ((10, 10),))


def operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: tuple, causal_captions: bool = False
) -> torch.Tensor:
    """Calls the function for GPU tensors, in its CPU implementation."""
    plan = plan_tiles(ranges, 2, q.device)
    y: torch.Tensor = PackedAttention.apply(q, k, v, plan, 2, causal_captions)
    return y


def problem() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(10, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]


@given(
    mix=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4)),
    seed=st.integers(0, 100),
    captions=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_equals_reference(mix: tuple[int, int, int], seed: int, captions: bool) -> None:
    batch = random_batch(CONFIG, *mix, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(batch.num_rows, 2, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    results = []
    for op in (packed_attention, operator, packed_attention_reference):
        y = op(q, k, v, batch.sequence_ranges, causal_captions=captions)
        weighted = (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y)).sum() + 0 * (q + k + v).sum()
        results.append([y, *torch.autograd.grad(weighted, (q, k, v))])
    for ours, the_operators, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(the_operators, expected)


@pytest.mark.parametrize("captions", [False, True])
@pytest.mark.parametrize("op", [packed_attention_reference, packed_attention, operator])
def test_gradcheck(op: object, captions: bool) -> None:
    assert torch.autograd.gradcheck(lambda *x: op(*x, RANGES, causal_captions=captions), problem())


def test_takes_the_operator_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls the op like CUDA tensors with their tiles, in the CPU implementation; projections may be views."""
    monkeypatch.setattr("beit3_ds.kernels.ops.packed_attention.runs_kernels", lambda q: True)
    monkeypatch.setattr(CHOICES, "backend", "triton")
    leaf = torch.randn(10, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    for captions in (False, True):
        results = []
        for op in (packed_attention, packed_attention_reference):
            y = op(*leaf.unbind(1), RANGES, causal_captions=captions)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_mask_of_captioning() -> None:
    """Checks the rows that a change reaches: from a caption's token, itself and later ones; from an image, its pair."""
    q, k, v = (x.detach() for x in problem())
    y = packed_attention(q, k, v, RANGES, causal_captions=True)
    changes = {}
    for row in (0, 3, 4, 7, 8):
        changed = packed_attention(q, k.index_add(0, torch.tensor([row]), k[:1]), v, RANGES, causal_captions=True)
        changes[row] = (changed != y).flatten(1).any(1).nonzero().flatten().tolist()
    assert changes == {0: [0, 1, 2], 3: [3, 4, 7, 8], 4: [3, 4, 7, 8], 7: [7, 8], 8: [8]}


def test_one_token_sequences() -> None:
    q, k, v = (torch.randn(3, 2, 4) for _ in range(3))
    ranges = (((0, 1),), ((1, 2),), ((2, 3),))
    torch.testing.assert_close(packed_attention(q, k, v, ranges), v)  # a softmax over one key is 1


def test_self_check_passes_right_kernels(recwarn: pytest.WarningsRecorder) -> None:
    """Checks that the self-check passes for the CPU implementation in place of the kernels."""
    module.check_kernels(CPU, torch.float32, 8)
    assert not recwarn


def test_self_check_finds_wrong_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = module._run_operator
    monkeypatch.setattr(module, "_run_operator", lambda *args, **kwargs: operator(*args, **kwargs) * 1.001)
    with pytest.raises(WrongResultError, match=r"y: error .* > "):
        module.check_kernels(CPU, torch.float32, 8)


def test_untrusted_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failed check that has no effect, and a check that calls itself."""
    asked = []
    monkeypatch.setattr(module.KERNELS, "are_trusted", lambda *key, **properties: asked.append((*key, properties)))
    monkeypatch.setattr(module, "_run_operator", lambda *args: pytest.fail("the kernels ran"))
    on_device = type("OnDevice", (), {"is_cuda": True, "device": CPU, "dtype": torch.float32, "shape": (4, 2, 8)})
    assert not module.runs_kernels(on_device)  # type: ignore[arg-type]
    assert asked == [(CPU, torch.float32, {"head_size": 8})]
    monkeypatch.setattr(module, "runs_kernels", lambda q: False)
    q = torch.randn(4, 2, 8)
    ranges = (((0, 3),), ((3, 4),))
    torch.testing.assert_close(packed_attention(q, q, q, ranges), packed_attention_reference(q, q, q, ranges))
