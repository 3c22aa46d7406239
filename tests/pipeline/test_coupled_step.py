"""Tests that a loss over the whole step has the gradients of one process, however a step is divided."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from tests.pipeline.matching import measure_layout, plain_steps
from tests.ranks import run_ranks
from tests.training.layouts import Layout
from tests.training.steps import Deal

ONE, TWO, FOUR = Layout(1, 1, 1), Layout(1, 1, 2), Layout(1, 1, 4)
TENSOR, SEQUENCE = Layout(2, 1, 1), Layout(2, 1, 1, sequence_parallel=True)
STAGES, INTERLEAVED = Layout(1, 2, 1), Layout(1, 2, 1, interleaved=True)
ALL_AXES = Layout(2, 2, 1, sequence_parallel=True)
LAYOUTS = (ONE, TWO, Layout(1, 1, 3), FOUR, TENSOR, SEQUENCE, STAGES, INTERLEAVED, Layout(1, 2, 2), ALL_AXES)


def divide(layout: Layout, num_micro_batches: int) -> list[Deal]:
    """Divides the pairs of one step evenly, and those of another step unevenly with an empty micro-batch."""
    shares = layout.data * num_micro_batches
    pairs = list(range(8))
    even = [pairs[i::shares] for i in range(shares)]
    borders = [min(8, 4 + share) for share in range(shares - 1)]
    uneven = [pairs[start:stop] for start, stop in zip([0, *borders], [*borders, 8], strict=True)]
    return [[shares[i :: layout.data] for i in range(layout.data)] for shares in (even, uneven)]


COVERING: dict[Layout, Sequence[tuple[int, str, int]]] = {
    ONE: [(0, "full", 4), (3, "none", 1)],
    TWO: [(1, "none", 4), (2, "full", 2), (3, "none", 1)],
    SEQUENCE: [(3, "none", 2)],
    STAGES: [(0, "none", 1), (3, "full", 4)],
}
"""ZeRO stage, checkpointing mode and micro-batches of the cells that every test run checks, by layout."""


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("matching") / "expected.pt"
    torch.save(plain_steps(), path)
    return path


def check_cells(layout: Layout, cells: Sequence[tuple[int, str, int]], expected: Path) -> None:
    dealt = [(zero_stage, checkpointing, divide(layout, count)) for zero_stage, checkpointing, count in cells]
    for rank, results in enumerate(run_ranks(measure_layout, layout.num_ranks, layout, dealt, expected, timeout=900)):
        wrong = {cell: errors for cell, errors in zip(cells, results, strict=True) if errors}
        assert not wrong, f"{layout}, rank {rank}: {wrong}"


@pytest.mark.parametrize("layout", COVERING, ids=str)
def test_steps_equal_those_of_one_process(layout: Layout, expected: Path) -> None:
    """Catches a wrong factor of features or temperature (norm; Adam hides it), and rows in another order."""
    check_cells(layout, COVERING[layout], expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_equals_one_process(layout: Layout, expected: Path) -> None:
    counts = (2, 4) if layout.interleaved else (1, 2, 4)
    cells = itertools.product(range(4), counts)
    turns = itertools.cycle(("none", "full"))
    check_cells(layout, [(stage, turn, count) for (stage, count), turn in zip(cells, turns, strict=False)], expected)


def test_the_loss_depends_on_the_whole_step(expected: Path) -> None:
    """Checks that the tests above would fail if pairs were compared only within their micro-batch."""
    assert float(torch.load(expected)["loss 0"][:2].min()) > torch.tensor(4.0).log()
