"""Tests that the grouped GEMM of kernels/csrc, emulated on a CPU, stays within its error bound."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_ds.kernels.ops.multiway_linear import multiway_linear_reference
from beit3_ds.kernels.ops.numerics import WrongResultError, check_against_reference
from tests.built_once import build_once
from tests.kernels.csrc.emulated import ELEMENTS, FailedError, Mistake, build, needs_compiler, parameters, read, run

pytestmark = needs_compiler

SMALL_ROWS = 32
SMALL = "32, 64, 32, 3, 16, 32"  # rows, columns, depth, stages, rows and columns of a warp: four warps
SHIPPED_ROWS = 128
SHIPPED = "128, 128, 32, 4, 64, 64"

# Two tiles, one of them with one row; no row; one row; a tile that is full, and one with a few rows.
RAGGED = ((0, 33), (33, 33), (33, 34), (34, 71))
UNTOUCHED = 7.0
"""Value of rows that belong to no expert, which must not change."""


class Case:
    """Holds rows and experts, with the results of the reference."""

    def __init__(self, slices: tuple[tuple[int, int], ...], depth: int, width: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(depth + width)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.slices, self.num_rows = slices, slices[-1][1]
        self.x = draw(self.num_rows, depth).to(dtype)
        self.weights = (draw(len(slices), width, depth) / depth**0.5).to(dtype)
        self.biases = draw(len(slices), width).to(dtype)

    def reference(self, x: torch.Tensor, weights: torch.Tensor, biases: torch.Tensor) -> tuple[torch.Tensor, ...]:
        u = multiway_linear_reference(x, self.slices, weights.unbind(), biases.unbind())
        return u, F.gelu(u)

    def tiles(self, rows: int) -> torch.Tensor:
        """Returns expert, first row and end row of every tile."""
        cuts = [
            (expert, first, min(first + rows, stop))
            for expert, (start, stop) in enumerate(self.slices)
            for first in range(start, stop, rows)
        ]
        return torch.tensor(cuts, dtype=torch.int32).view(-1, 3)

    def run(
        self,
        program: Path,
        folder: Path,
        rows: int,
        *,
        gelu: bool = True,
        early: bool = False,
        is_reversed: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns u and a of the kernel, beginning with one row that belongs to no expert."""
        width = self.biases.shape[1]
        untouched = self.x.new_full((self.num_rows + 1, width), UNTOUCHED)
        arrays = {"x": self.x, "weights": self.weights, "biases": self.biases, "tiles": self.tiles(rows)}
        settings = (self.x.shape[1], width, len(self.slices), gelu, early, is_reversed)
        run(program, folder, arrays | {"u": untouched, "a": untouched}, *settings)
        return read(folder / "u", untouched), read(folder / "a", untouched)

    def check(self, u: torch.Tensor, a: torch.Tensor) -> None:
        """Checks the error bounds of results, and that the row without expert is unchanged."""
        assert bool((u[-1] == UNTOUCHED).all()) and bool((a[-1] == UNTOUCHED).all())
        check_against_reference(("u", "a"), (u[:-1], a[:-1]), self.reference, (self.x, self.weights, self.biases))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Builds the kernel with small tiles, in two precisions."""
    return {
        dtype: build_once(
            tmp_path_factory, f"grouped_gemm-{dtype}", lambda folder, dtype=dtype: build_kernel(folder, dtype, SMALL)
        )
        / "grouped_gemm"
        for dtype in ELEMENTS
    }


def build_kernel(folder: Path, dtype: torch.dtype, shape: str, mistake: Mistake | None = None) -> Path:
    return build(folder, "grouped_gemm", f"GEMM={ELEMENTS[dtype]}, {shape}", mistake)


@pytest.mark.parametrize("is_reversed", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("early", [False, True], ids=["late copies", "early copies"])
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_kernel_follows_the_reference(
    small: dict[torch.dtype, Path], tmp_path: Path, dtype: torch.dtype, early: bool, is_reversed: bool
) -> None:
    """Checks more steps than pipeline stages, with widths that are no multiples of a tile."""
    case = Case(RAGGED, depth=168, width=72, dtype=dtype)
    case.check(*case.run(small[dtype], tmp_path, SMALL_ROWS, early=early, is_reversed=is_reversed))


@pytest.mark.parametrize(("depth", "width"), [(8, 8), (32, 64), (40, 136)])
def test_widths(small: dict[torch.dtype, Path], tmp_path: Path, depth: int, width: int) -> None:
    """Checks fewer steps than pipeline stages, with one, two and three column tiles."""
    case = Case(((0, 5),), depth, width, torch.bfloat16)
    case.check(*case.run(small[torch.bfloat16], tmp_path, SMALL_ROWS))


def test_order_of_blocks(small: dict[torch.dtype, Path], tmp_path: Path) -> None:
    """Checks more row tiles than one group has, with a smaller last group and two column tiles."""
    case = Case(tuple((i * 5, i * 5 + 5) for i in range(4)), 8, 72, torch.bfloat16)
    case.check(*case.run(small[torch.bfloat16], tmp_path, rows=2))


def test_activation_is_optional(small: dict[torch.dtype, Path], tmp_path: Path) -> None:
    case = Case(RAGGED, 16, 8, torch.bfloat16)
    u, a = case.run(small[torch.bfloat16], tmp_path, SMALL_ROWS, gelu=False)
    assert bool((a == UNTOUCHED).all())
    check_against_reference(
        ("u",), (u[:-1],), lambda *inputs: case.reference(*inputs)[:1], (case.x, case.weights, case.biases)
    )


lengths = st.lists(st.integers(0, 70), min_size=1, max_size=4).filter(any)


@given(lengths=lengths, depth=st.integers(1, 20), width=st.integers(1, 20), early=st.booleans())
@settings(max_examples=6, deadline=None)
def test_any_slices(small: dict[torch.dtype, Path], lengths: list[int], depth: int, width: int, early: bool) -> None:
    slices = tuple(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    case = Case(slices, 8 * depth, 8 * width, torch.bfloat16)
    with TemporaryDirectory() as folder:
        case.check(*case.run(small[torch.bfloat16], Path(folder), SMALL_ROWS, early=early))


@pytest.mark.slow
@given(lengths=lengths, depth=st.integers(1, 40), width=st.integers(1, 40), dtype=st.sampled_from(list(ELEMENTS)))
@settings(max_examples=60, deadline=None)
def test_any_slices_and_dtypes(
    small: dict[torch.dtype, Path], lengths: list[int], depth: int, width: int, dtype: torch.dtype
) -> None:
    slices = tuple(itertools.pairwise([0, *itertools.accumulate(lengths)]))
    case = Case(slices, 8 * depth, 8 * width, dtype)
    with TemporaryDirectory() as folder:
        case.check(*case.run(small[dtype], Path(folder), SMALL_ROWS, is_reversed=True))


def test_shipped_tiles(tmp_path: Path) -> None:
    case = Case(((0, 129), (129, 150)), 200, 136, torch.bfloat16)
    case.check(*case.run(build_kernel(tmp_path, torch.bfloat16, SHIPPED), tmp_path, SHIPPED_ROWS))


GEMM, FRAGMENTS = "grouped_gemm.cuh", "fragments.cuh"
MISTAKES = {
    "no barrier": Mistake(GEMM, "      __syncthreads();\n", "", "without a barrier|never written"),
    "no wait": Mistake(GEMM, "      wait_for_copies<kStages - 2>();\n", "", "still on its way"),
    "wait for one stage too few": Mistake(GEMM, "<kStages - 2>", "<kStages - 1>", "still on its way", is_slow=True),
    "refill of a stage in use": Mistake(
        GEMM,
        "place, step + kStages - 1, steps",
        "place, step + kStages, steps",
        "still on its way|overwrites|never written|error",
        is_slow=True,
    ),
    "no closed group at the end": Mistake(
        GEMM, "    }\n    commit_copies();\n", "    commit_copies();\n    }\n", "way", is_slow=True
    ),
    "rows of the next expert": Mistake(GEMM, "if (row >= stop || column", "if (column", "heap-buffer-overflow"),
    "last row missing": Mistake(
        GEMM, "const bool real = row < stop &&", "const bool real = row < stop - 1 &&", "u: error", is_slow=True
    ),
    "no zeros beyond the rows": Mistake(GEMM, "real = row < stop &&", "real =", "heap-buffer-overflow", is_slow=True),
    "no zero fill": Mistake(GEMM, "copy_async(tile +", "if (real) copy_async(tile +", "never written"),
    "no zeros beyond the columns": Mistake(
        GEMM, "row < stop && column < width;", "row < stop;", "heap-buffer-overflow|u: error", is_slow=True
    ),
    "another expert's bias": Mistake(GEMM, "biases[expert] + column", "biases[0] + column", "u: error", is_slow=True),
    "bias of another column": Mistake(GEMM, "lane % 4 * 2);", "lane % 4);", "u: error|misaligned", is_slow=True),
    "columns beyond the last": Mistake(
        GEMM,
        "if (row >= stop || column >= arguments.output_width)",
        "if (row >= stop)",
        "heap-buffer-overflow|u: error|assert",
        is_slow=True,
    ),
    "tiles swapped in a group": Mistake(
        GEMM, "% in_group % height)", "% in_group / height)", "u: error|assert|overflow", is_slow=True
    ),
    "tanh in the place of erf": Mistake(
        GEMM, "erff(u * 0.70710678f)", "tanhf(u * 0.797884561f)", "a: error", is_slow=True
    ),
    "GELU without its half": Mistake(GEMM, "return 0.5f * u *", "return u *", "a: error", is_slow=True),
    "no swizzle": Mistake(FRAGMENTS, "(chunk ^ (row * kChunks / 8 % kChunks))", "chunk", "share banks"),
    "swizzle that repeats too soon": Mistake(
        FRAGMENTS, "row * kChunks / 8 % kChunks", "row % kChunks", "share banks", is_slow=True
    ),
    "transposition of the wrong pairs": Mistake(
        FRAGMENTS, "upper ? pairs[i] : pairs[i | bit], bit", "pairs[i], bit", "u: error", is_slow=True
    ),
    "halves of the left operand swapped": Mistake(
        FRAGMENTS,
        "row + lane % 16, chunk + lane / 16));\n}\n\n// Reads the right",
        "row + lane % 16, chunk + 1 - lane / 16));\n}\n\n// Reads the right",
        "u: error",
        is_slow=True,
    ),
}


@pytest.mark.parametrize("mistake", parameters(MISTAKES))
def test_planted_mistakes_are_found(mistake: Mistake, tmp_path: Path) -> None:
    program = build_kernel(tmp_path, torch.bfloat16, SMALL, mistake)
    case = Case(RAGGED, depth=168, width=72, dtype=torch.bfloat16)
    with pytest.raises((FailedError, WrongResultError, AssertionError), match=mistake.finding):
        case.check(*case.run(program, tmp_path, SMALL_ROWS))
