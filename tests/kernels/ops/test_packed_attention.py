"""Packed attention against one softmax a sequence, over ragged sequences of one or two ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops.attention_plan import bucket_by_length, plan_attention, plan_tiles
from beit3_ds.kernels.ops.packed_attention import packed_attention, packed_attention_reference
from tests.batches import random_batch, small_model_config

CONFIG = small_model_config()


RANGES = (((0, 3),), ((3, 5), (7, 9)), ((5, 6), (9, 10)), ((6, 7),), ((10, 10),))


def operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: tuple, causal_captions: bool = False
) -> torch.Tensor:
    """The operator that a GPU takes, with its implementation for the CPU."""
    plan = plan_tiles(ranges, 2, q.device)
    return torch.ops.beit3_ds.packed_attention(q, k, v, *plan, 2, causal_captions)[0]


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
    """The way that a GPU's tensors go, with its tiles but the CPU's implementation; projections may be views."""
    monkeypatch.setattr("beit3_ds.kernels.ops.packed_attention.runs_kernels", lambda q: True)
    leaf = torch.randn(10, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    for captions in (False, True):
        results = []
        for op in (packed_attention, packed_attention_reference):
            y = op(*leaf.unbind(1), RANGES, causal_captions=captions)
            results.append([y, *torch.autograd.grad(y.square().sum(), leaf)])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


def test_opcheck() -> None:
    for causal_captions in (False, True):
        arguments = (*problem(), *plan_tiles(RANGES, 2, torch.device("cpu")), 2, causal_captions)
        torch.library.opcheck(torch.ops.beit3_ds.packed_attention.default, arguments)


def test_mask_of_captioning() -> None:
    """A caption's token changes itself and what follows it; an image's row changes everything."""
    q, k, v = (x.detach() for x in problem())
    y = packed_attention(q, k, v, RANGES, causal_captions=True)
    changes = {}
    for row in (0, 3, 4, 7, 8):
        changed = packed_attention(q, k.index_add(0, torch.tensor([row]), k[:1]), v, RANGES, causal_captions=True)
        changes[row] = (changed != y).flatten(1).any(1).nonzero().flatten().tolist()
    assert changes == {0: [0, 1, 2], 3: [3, 4, 7, 8], 4: [3, 4, 7, 8], 7: [7, 8], 8: [8]}


def test_tiles_cover_every_sequence_once() -> None:
    plan = plan_tiles(RANGES, 2, torch.device("cpu"))
    assert plan.sequences_Q4.tolist() == [[0, 3, 0, 0], [3, 2, 7, 2], [5, 1, 9, 1], [6, 1, 0, 0], [10, 0, 0, 0]]
    assert plan.tiles_N2.tolist() == [[1, 0], [1, 2], [0, 0], [0, 2], [2, 0], [3, 0]]


def test_equal_images_are_a_view() -> None:
    """Images must not be gathered or padded, though pairs are hardly longer: they are many of the rows."""
    ranges = (((0, 17),), ((17, 34),), ((34, 51), (68, 71)), ((51, 68), (71, 76)))
    images, pairs = plan_attention(ranges, torch.device("cpu")).buckets
    assert images.first_row == 0 and images.num_sequences == 2
    assert images.key_mask is None and images.real is None
    assert pairs.num_sequences == 2


def test_a_group_has_at_most_so_many_rows() -> None:
    ranges = (*(((start, start + 100),) for start in range(0, 500, 100)), ((500, 900),))
    assert bucket_by_length(ranges, 1.5, 256) == [[0, 1], [2, 3], [4], [5]]
    assert bucket_by_length(ranges, 1.5, None) == [[0, 1, 2, 3, 4], [5]]


def test_one_token_sequences() -> None:
    q, k, v = (torch.randn(3, 2, 4) for _ in range(3))
    ranges = (((0, 1),), ((1, 2),), ((2, 3),))
    torch.testing.assert_close(packed_attention(q, k, v, ranges), v)  # a softmax over one key is 1
