"""Tests that packed attention of kernels/csrc, emulated on a CPU, stays within its error bound."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops.attention_plan import Ranges, plan_tiles
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference
from beit3_ds.kernels.ops.packed_attention import forward_plain, packed_attention_reference
from tests.built_once import build_once
from tests.kernels.csrc.emulated import ELEMENTS, FailedError, Mistake, build, needs_compiler, parameters, read, run
from tests.kernels.triton.test_packed_attention import build_ranges

pytestmark = needs_compiler

SMALL_TILE = 32
SMALL = "32, 16, 96, 2"  # queries, keys a step, columns, stages: two warps
SHIPPED_TILE = 128
SHIPPED = "128, 64, 96, 2"

# One range; pairs whose first range ends inside a tile, at its edge, and after one row; one token; no row at all.
RAGGED: Ranges = (
    ((0, 40),),
    ((40, 80), (144, 165)),
    ((80, 112), (165, 170)),
    ((112, 113), (170, 190)),
    ((113, 114),),
    ((114, 114),),
    ((114, 144), (190, 192)),
)
UNTOUCHED = 7.0
"""Value of rows that belong to no sequence, which must not change."""


class Case:
    """Holds queries, keys and values, with the results of the reference."""

    def __init__(self, ranges: Ranges, head_width: int, dtype: torch.dtype, captions: bool, heads: int = 2) -> None:
        self.ranges, self.captions, self.heads = ranges, captions, heads
        self.num_rows = max(stop for sequence in ranges for _, stop in sequence)
        generator = torch.Generator().manual_seed(self.num_rows + head_width)
        self.inputs = torch.randn(3, self.num_rows, heads, head_width, generator=generator).to(dtype).unbind()

    def reference(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (packed_attention_reference(*inputs, ranges=self.ranges, causal_captions=self.captions),)

    def run(
        self, program: Path, folder: Path, tile: int, *, early: bool = False, is_reversed: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns y and the log-sum-exp of the kernel."""
        q, k, v = self.inputs
        y, lse = torch.full_like(q, UNTOUCHED), torch.full((self.heads, self.num_rows), UNTOUCHED)
        sequences, tiles = plan_tiles(self.ranges, tile, torch.device("cpu"))
        arrays = {"q": q, "k": k, "v": v, "y": y, "lse": lse, "sequences": sequences, "tiles": tiles}
        run(program, folder, arrays, self.heads, q.shape[2], self.captions, early, is_reversed)
        return read(folder / "y", y), read(folder / "lse", lse)

    def check(self, y: torch.Tensor, lse: torch.Tensor) -> None:
        """Checks y against its error bound, and the log-sum-exp against the operator on a CPU in float64."""
        check_against_reference(("y",), (y,), self.reference, self.inputs)
        plan = plan_tiles(self.ranges, SMALL_TILE, torch.device("cpu"))
        doubles = (x.double() for x in self.inputs)
        _, expected = forward_plain(*doubles, *plan, SMALL_TILE, self.captions)
        torch.testing.assert_close(lse, expected.float(), msg=lambda text: f"lse: {text}")


def build_kernel(folder: Path, dtype: torch.dtype, shape: str, mistake: Mistake | None = None) -> Path:
    return build(folder, "packed_attention", f"ATTENTION={ELEMENTS[dtype]}, {shape}", mistake)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Builds the kernel with small tiles, in two precisions."""
    return {
        dtype: build_once(
            tmp_path_factory,
            f"packed_attention-{dtype}",
            lambda folder, dtype=dtype: build_kernel(folder, dtype, SMALL),
        )
        / "packed_attention"
        for dtype in ELEMENTS
    }


@pytest.mark.parametrize("captions", [False, True], ids=["bidirectional", "captions"])
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_kernel_follows_the_reference(
    small: dict[torch.dtype, Path], tmp_path: Path, dtype: torch.dtype, captions: bool
) -> None:
    case = Case(RAGGED, 88, dtype, captions)
    case.check(*case.run(small[dtype], tmp_path, SMALL_TILE))


@pytest.mark.parametrize(("early", "is_reversed"), [(False, True), (True, False), (True, True)])
def test_order_does_not_matter(small: dict[torch.dtype, Path], tmp_path: Path, early: bool, is_reversed: bool) -> None:
    """Checks copies that complete at once, and warps that run in another order."""
    case = Case((((0, 40), (70, 81)), ((40, 70),)), 88, torch.bfloat16, captions=True, heads=1)
    case.check(*case.run(small[torch.bfloat16], tmp_path, SMALL_TILE, early=early, is_reversed=is_reversed))


@pytest.mark.parametrize("head_width", [8, 40, 64, 96])
def test_head_widths(small: dict[torch.dtype, Path], tmp_path: Path, head_width: int) -> None:
    """Catches columns that are read beyond a head or never written."""
    case = Case((((0, 20), (37, 41)), ((20, 37),)), head_width, torch.float16, captions=False)
    case.check(*case.run(small[torch.float16], tmp_path, SMALL_TILE))


def test_other_sequences_do_not_matter(small: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """Catches a kernel that reads rows of other sequences; NaNs there must change nothing, even times 0."""
    ranges = (((0, 20), (30, 35)), ((20, 30), (35, 40)))
    case = Case(ranges, 88, torch.bfloat16, captions=True, heads=1)
    own = [*range(20), *range(30, 35)]
    clean, _ = case.run(small[torch.bfloat16], tmp_path, SMALL_TILE)
    for x in case.inputs:
        x[20:30] = x[35:40] = torch.nan
    y, _ = case.run(small[torch.bfloat16], tmp_path, SMALL_TILE)
    assert torch.equal(y[own], clean[own])


def test_large_scores_do_not_overflow(small: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """Catches absent keys with a score of 0, which would dominate real scores of minus some hundreds."""
    case = Case((((0, 35),),), 88, torch.bfloat16, captions=False, heads=1)
    case.inputs = (case.inputs[0] - 6, case.inputs[1] + 6, case.inputs[2])
    case.check(*case.run(small[torch.bfloat16], tmp_path, SMALL_TILE))


sequence_lengths = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3).filter(
    lambda lengths: any(sum(pair) for pair in lengths)
)


@given(lengths=sequence_lengths, captions=st.booleans(), early=st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_ranges(
    small: dict[torch.dtype, Path], lengths: list[tuple[int, int]], captions: bool, early: bool
) -> None:
    case = Case(build_ranges(lengths), 88, torch.bfloat16, captions, heads=1)
    with TemporaryDirectory() as folder:
        case.check(*case.run(small[torch.bfloat16], Path(folder), SMALL_TILE, early=early))


@pytest.mark.slow
@given(
    lengths=sequence_lengths,
    captions=st.booleans(),
    head_width=st.integers(1, 12),
    dtype=st.sampled_from(list(ELEMENTS)),
)
@settings(max_examples=60, deadline=None)
def test_any_ranges_widths_and_dtypes(
    small: dict[torch.dtype, Path],
    lengths: list[tuple[int, int]],
    captions: bool,
    head_width: int,
    dtype: torch.dtype,
) -> None:
    case = Case(build_ranges(lengths), 8 * head_width, dtype, captions)
    with TemporaryDirectory() as folder:
        case.check(*case.run(small[dtype], Path(folder), SMALL_TILE, is_reversed=True))


def test_shipped_tiles(tmp_path: Path) -> None:
    """Checks the shipped tiles on an image and a caption over two tiles, and on a short text."""
    case = Case((((0, 120), (121, 150)), ((120, 121),)), 88, torch.bfloat16, captions=True, heads=1)
    case.check(*case.run(build_kernel(tmp_path, torch.bfloat16, SHIPPED), tmp_path, SHIPPED_TILE))


ATTENTION, FRAGMENTS = "packed_attention.cuh", "fragments.cuh"
MISTAKES = {
    "no barrier before the queries": Mistake(
        ATTENTION,
        "    __syncthreads();\n    Softmax softmax",
        "    Softmax softmax",
        "without a barrier|never written",
        is_slow=True,
    ),
    "no barrier in the loop": Mistake(
        ATTENTION,
        "      __syncthreads();\n      fetch",
        "      fetch",
        "without a barrier|never written|on its way|overwrites",
    ),
    "no wait for the queries": Mistake(
        ATTENTION, "    wait_for_copies<kStages - 1>();\n", "", "still on its way", is_slow=True
    ),
    "no wait in the loop": Mistake(
        ATTENTION, "      wait_for_copies<kStages - 2>();\n", "", "still on its way", is_slow=True
    ),
    "no mask": Mistake(ATTENTION, "        mask(scores, arguments, sequence, begin);\n", "", "y: error"),
    "mask in the last block only": Mistake(
        ATTENTION,
        "sequence.limit(sequence.first, arguments.captions)) {",
        "sequence.total) {",
        "y: error",
        is_slow=True,
    ),
    "a caption sees one word too few": Mistake(
        ATTENTION, "max(length_1, query + 1)", "max(length_1, query)", "y: error", is_slow=True
    ),
    "an image sees its caption": Mistake(
        ATTENTION, "return captions ? min", "return captions && query >= length_1 ? min", "y: error", is_slow=True
    ),
    "queries that stop too early": Mistake(
        ATTENTION, "limit(first + kTile - 1, captions)", "limit(first, captions)", "y: error", is_slow=True
    ),
    "wrong scale": Mistake(
        ATTENTION, "exponentiate(scores, arguments.scale)", "exponentiate(scores, arguments.scale * 1.02f)", "y: error"
    ),
    "second range from the first's start": Mistake(
        ATTENTION, "start_1 : offset_2)", "start_1 : start_1)", "y: error", is_slow=True
    ),
    "second range one row late": Mistake(
        ATTENTION, "sequence[2] - sequence[1], seq", "sequence[2] - sequence[1] + 1, seq", "y: error|overflow"
    ),
    "another head": Mistake(
        ATTENTION, "arguments.num_heads + head)", "arguments.num_heads + 1 - head)", "lse", is_slow=True
    ),
    "no zeros beyond the keys": Mistake(
        ATTENTION,
        "const bool real = position < sequence.total && chunk",
        "const bool real = chunk",
        "heap-buffer-overflow|error",
    ),
    "no zeros beyond the head": Mistake(
        ATTENTION,
        "position < sequence.total && chunk * kChunk < arguments.head_width;",
        "position < sequence.total;",
        "heap-buffer-overflow|y: error",
        is_slow=True,
    ),
    "columns of the next head": Mistake(
        ATTENTION,
        "if (real && column < arguments.head_width)",
        "if (real)",
        "heap-buffer-overflow|y: error",
        is_slow=True,
    ),
    "rows of the next sequence": Mistake(
        ATTENTION,
        "const bool real = query < sequence.total;",
        "const bool real = true;",
        "error|overflow",
        is_slow=True,
    ),
    "sums that do not shrink": Mistake(ATTENTION, "        weight[g] *= shrink;\n", "", "error", is_slow=True),
    "maximum of a quarter of the row": Mistake(
        ATTENTION,
        "        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));\n",
        "",
        "error",
        is_slow=True,
    ),
    "weight of half the row": Mistake(
        ATTENTION, "        total += __shfl_xor_sync(kWholeWarp, total, 2);\n", "", "error", is_slow=True
    ),
    "logarithm of base 2": Mistake(ATTENTION, "top[g] * kLn2 + logf", "top[g] + logf", "lse", is_slow=True),
    "rows without a gap": Mistake(
        FRAGMENTS,
        "return 16 * (row * (kChunks | 1) + chunk); }",
        "return 16 * (row * kChunks + chunk); }",
        "share banks",
        is_slow=True,
    ),
    "values not transposed": Mistake(
        FRAGMENTS, "load_matrices_transposed(b,", "load_matrices(b,", "y: error", is_slow=True
    ),
}


@pytest.mark.parametrize("mistake", parameters(MISTAKES))
def test_planted_mistakes_are_found(mistake: Mistake, tmp_path: Path) -> None:
    program = build_kernel(tmp_path, torch.bfloat16, SMALL, mistake)
    case = Case(RAGGED, 88, torch.bfloat16, captions=True)
    with pytest.raises((FailedError, WrongResultError, AssertionError), match=mistake.finding):
        case.check(*case.run(program, tmp_path, SMALL_TILE))
