"""Tests that the attention kernels, interpreted, stay within their error bound."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops import packed_attention as packed_attention_module
from beit3_ds.kernels.ops.attention_plan import Ranges, plan_tiles
from beit3_ds.kernels.ops.numerics import check_against_reference, with_gradients
from beit3_ds.kernels.ops.packed_attention import (
    forward_plain,
    packed_attention,
    packed_attention_reference,
    runs_kernels,
)
from beit3_ds.kernels.triton.packed_attention_launch import (
    AttentionTiling,
    KernelConfig,
    backward,
    choose_tiling,
    column_blocks,
    forward,
)
from tests.kernels.interpreter import interpreted

CPU = torch.device("cpu")
SMALL = AttentionTiling(4, KernelConfig(4, 1, 1), KernelConfig(2, 1, 1), KernelConfig(2, 1, 1))
# One range; pairs whose first range ends inside a tile, at its edge, and after one row; one token; no row at all.
RAGGED: Ranges = (
    ((0, 5),),
    ((5, 10), (18, 21)),
    ((10, 14), (21, 23)),
    ((14, 15), (23, 27)),
    ((15, 16),),
    ((16, 16),),
    ((16, 18), (27, 28)),
    ((28, 30),),
)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case:
    """Holds queries, keys, values and a gradient of the output, with the results of the reference."""

    def __init__(
        self, ranges: Ranges, head_size: int, dtype: torch.dtype, captions: bool, heads: int = 2, device: str = "cpu"
    ) -> None:
        self.ranges, self.captions = ranges, captions
        num_rows = sum(stop - start for sequence in ranges for start, stop in sequence)
        generator = torch.Generator().manual_seed(num_rows + head_size)
        shape = (4, num_rows, heads, head_size)
        self.q, self.k, self.v, self.dy = torch.randn(shape, generator=generator).to(device, dtype).unbind()

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the output and the gradients of q, k and v.

        Args:
            *inputs: q, k, v, and the gradient of the output.
        """
        attention = partial(packed_attention_reference, ranges=self.ranges, causal_captions=self.captions)
        return with_gradients(attention)(*inputs)

    def interpret(self, tiling: AttentionTiling) -> tuple[torch.Tensor, ...]:
        """Runs the kernels in Triton's interpreter; returns the output and the gradients of q, k and v."""
        plan = plan_tiles(self.ranges, tiling.tile, CPU)
        with interpreted():
            y, lse = forward(self.q, self.k, self.v, *plan, tiling, self.captions)
            gradients = backward(self.dy, self.q, self.k, self.v, y, lse, *plan, tiling, self.captions)
        return y, *gradients

    def check(self, results: tuple[torch.Tensor, ...]) -> None:
        """Checks the error bounds of results."""
        assert all(result.dtype == self.q.dtype for result in results)
        check_against_reference(("y", "dq", "dk", "dv"), results, self.reference, (self.q, self.k, self.v, self.dy))


@pytest.mark.parametrize("captions", [False, True], ids=["bidirectional", "captions"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_follow_the_reference(dtype: torch.dtype, captions: bool) -> None:
    case = Case(RAGGED, 88, dtype, captions)
    case.check(case.interpret(SMALL))


@pytest.mark.parametrize("head_size", [4, 8, 40, 64, 128])
def test_head_widths(head_size: int) -> None:
    """Catches a column that is computed twice or never if a head has two blocks."""
    case = Case((((0, 2), (3, 4)), ((2, 3),)), head_size, torch.float32, captions=False)
    case.check(case.interpret(SMALL))


@pytest.mark.parametrize(
    ("head_size", "blocks"),
    [(4, (16, 0)), (24, (32, 0)), (40, (32, 16)), (64, (64, 0)), (72, (64, 16)), (88, (64, 32)), (104, (128, 0))],
)
def test_column_blocks(head_size: int, blocks: tuple[int, int]) -> None:
    assert column_blocks(head_size) == blocks


def test_shipped_tiles() -> None:
    """Checks the giant model's tiles of sm_90 on an image and a caption; one tile has rows of each."""
    case = Case((((0, 120), (121, 150)), ((120, 121),)), 88, torch.bfloat16, captions=True, heads=1)
    case.check(case.interpret(choose_tiling(90, 88, torch.bfloat16)))


def test_log_sum_exp() -> None:
    case = Case(RAGGED, 8, torch.float32, captions=True)
    with interpreted():
        _, lse = forward(case.q, case.k, case.v, *plan_tiles(RAGGED, 4, CPU), SMALL, True)
    plan = plan_tiles(RAGGED, 4, CPU)
    _, expected = forward_plain(case.q, case.k, case.v, *plan, 4, True)
    assert lse.dtype == torch.float32 and lse.shape == (2, 30)
    torch.testing.assert_close(lse, expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about keys that are not there and never stored
@pytest.mark.parametrize("sign", [1, -1])
def test_large_scores_do_not_overflow(sign: int) -> None:
    """Catches an overflow of exp for scores of some hundreds, and absent keys with score 0 beside negative scores."""
    case = Case((((0, 5),),), 8, torch.float32, captions=False)
    case.q, case.k = sign * (case.q + 10), case.k + 10
    truths = case.reference(*(x.double() for x in (case.q, case.k, case.v, case.dy)))
    for ours, truth in zip(case.interpret(SMALL), truths, strict=True):
        # exp(score - lse) has the error of a large score, where a softmax that knows the maximum has not.
        torch.testing.assert_close(ours, truth.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the NaNs
def test_other_sequences_do_not_matter() -> None:
    """Catches a kernel that reads rows of other sequences; NaNs there must change nothing, even times 0."""
    ranges = (((0, 5), (8, 9)), ((5, 8), (9, 12)))
    case = Case(ranges, 8, torch.float32, captions=False)
    clean = case.interpret(SMALL)
    rows = [5, 6, 7, 9, 10, 11]
    for x in (case.q, case.k, case.v, case.dy):
        x[rows] = torch.nan
    for ours, expected in zip(case.interpret(SMALL), clean, strict=True):
        assert torch.equal(ours[[0, 1, 2, 3, 4, 8]], expected[[0, 1, 2, 3, 4, 8]])


def test_operators_launch_the_kernels() -> None:
    """Catches arguments that are swapped on the way to the launches."""
    case = Case((((0, 5),), ((5, 7), (7, 9))), 8, torch.float32, captions=True, heads=1)
    plan, inputs = plan_tiles(case.ranges, 8, CPU), (case.q, case.k, case.v)
    with interpreted():
        y, lse = packed_attention_module._forward_triton(*inputs, *plan, 8, True)
        gradients = packed_attention_module._backward_triton(case.dy, *inputs, y, lse, *plan, 8, True)
    case.check((y, *gradients))


def test_no_rows() -> None:
    for ranges in ((), (((0, 0),), ((0, 0), (0, 0)))):
        case = Case(ranges, 8, torch.float32, captions=False)
        assert all(x.shape == (0, 2, 8) for x in case.interpret(SMALL))


sequence_lengths = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), max_size=3)


def build_ranges(lengths: list[tuple[int, int]]) -> Ranges:
    """Builds sequences whose first ranges all precede all second ranges, as in a micro-batch."""
    firsts, row = [], 0
    for length, _ in lengths:
        firsts.append((row, row + length))
        row += length
    ranges = []
    for first, (_, length) in zip(firsts, lengths, strict=True):
        ranges.append((first, (row, row + length)) if length else (first,))
        row += length
    return tuple(ranges)


@given(lengths=sequence_lengths, captions=st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_ranges(lengths: list[tuple[int, int]], captions: bool) -> None:
    case = Case(build_ranges(lengths), 8, torch.float32, captions, heads=1)
    if len(case.q):
        case.check(case.interpret(SMALL))


@pytest.mark.slow
@given(lengths=sequence_lengths, captions=st.booleans(), head_size=st.integers(1, 128), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_any_ranges_widths_and_dtypes(
    lengths: list[tuple[int, int]], captions: bool, head_size: int, dtype: torch.dtype
) -> None:
    case = Case(build_ranges(lengths), head_size, dtype, captions)
    if len(case.q):
        case.check(case.interpret(SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("head_size", [64, 88, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_all_shipped_tiles(architecture: int, dtype: torch.dtype, head_size: int) -> None:
    case = Case((((0, 197), (198, 230)), ((197, 198),), ((230, 330),)), head_size, dtype, captions=True, heads=1)
    case.check(case.interpret(choose_tiling(architecture, head_size, dtype)))


@pytest.mark.gpu
@pytest.mark.parametrize("captions", [False, True], ids=["bidirectional", "captions"])
@pytest.mark.parametrize("head_size", [4, 40, 64, 88, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_device(dtype: torch.dtype, head_size: int, captions: bool) -> None:
    """Runs the op on a GPU twice, because the backward pass must be deterministic."""
    for ranges in (RAGGED, (((0, 197), (198, 230)), ((197, 198),), ((230, 330),)), ()):
        case = Case(ranges, head_size, dtype, captions, device="cuda")
        runs = []
        for _ in range(2):
            leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
            assert runs_kernels(leaves[0])
            y = packed_attention(*leaves, ranges, causal_captions=captions)
            runs.append((y, *torch.autograd.grad(y, leaves, case.dy)))
        assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
        if len(case.q):
            case.check(runs[0])
