"""Tests loss, gradients, gradient norm and update of a step under every parallel layout and ZeRO stage."""

import json
import os
import time
from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.training.layouts import (
    MAX_RANKS,
    ORDERS,
    PAIRWISE_CELLS,
    Cell,
    Layout,
    all_cells,
    all_layouts,
    deal_number,
    deals,
    matrix_cells,
    measure_cells,
    pairwise_cells,
    pairwise_depth,
)
from tests.training.steps import MIXES, NUM_LAYERS, Reference, check

RECORD = "BEIT3_DS_LAYOUT_RECORD"
"""Environment variable with the path of a file to which tests append one line per cell.

`tests.training.layout_table` reads the file.
"""


def run_cells(layout: Layout, cells: list[Cell], reference: Reference, num_layers: int) -> None:
    """Compares the cells of one layout in the same processes, so an earlier cell may break a later one."""
    begin = time.monotonic()
    results = run_ranks(measure_cells, layout.num_ranks, cells, reference, num_layers, timeout=1800)
    seconds = time.monotonic() - begin
    for cell, ratios in zip(cells, zip(*results, strict=True), strict=True):
        ratio = check(ratios, reference.load(cell.model, num_layers), str(cell))
        if RECORD in os.environ:
            line = {**layout._asdict(), **cell._asdict(), "ratio": ratio, "seconds": seconds / len(cells)}
            del line["layout"]
            with Path(os.environ[RECORD]).open("a") as file:
                file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize("layout", pairwise_cells(), ids=str)
def test_pairwise(layout: Layout, reference: Reference) -> None:
    """Catches an unmarked parameter (norm), a bias added once per rank (loss), and a missing all-reduce (gradient)."""
    run_cells(layout, pairwise_cells()[layout], reference, pairwise_depth(layout))


@pytest.mark.slow
@pytest.mark.parametrize("layout", all_layouts(), ids=str)
def test_matrix(layout: Layout, reference: Reference) -> None:
    run_cells(layout, matrix_cells(layout), reference, NUM_LAYERS)


def test_pairwise_cells_cover_every_pair() -> None:
    """Catches a valid pair of values that no cell covers, and a cell that is invalid or redundant."""
    cells = [cell for cells in pairwise_cells().values() for cell in cells]
    pairs = set().union(*(cell.pairs for cell in all_cells()))
    assert set().union(*(cell.pairs for cell in cells)) == pairs
    assert set(cells) <= set(all_cells()) and len(cells) == len(PAIRWISE_CELLS)
    for cell in cells:
        assert set().union(*(other.pairs for other in cells if other != cell)) < pairs, f"{cell} adds nothing"


def test_matrix_holds_what_it_says() -> None:
    layouts = list(all_layouts())
    shapes = {layout[:3] for layout in layouts}
    assert len(layouts) == 34 and len(shapes) == 14
    assert all(layout.num_ranks <= MAX_RANKS for layout in layouts)
    cells = [cell for layout in layouts for cell in matrix_cells(layout)]
    assert len(cells) == len(set(cells)) == 340
    for model in ("paper", "decoupled"):
        assert {cell[:2] for cell in cells if cell.model == model} == {(lay, z) for lay in layouts for z in range(4)}
    for model in ("sub-LN", "tied"):
        assert {cell.layout for cell in cells if cell.model == model} == set(layouts)
        assert {cell.zero_stage for cell in cells if cell.model == model} == {0, 1, 2, 3}
    pairs = set().union(*(cell.pairs for cell in cells))
    assert pairs == set().union(*(cell.pairs for cell in all_cells())), "checkpointing too meets every value"


@pytest.mark.parametrize("data", [1, 2])
@pytest.mark.parametrize("interleaved", [False, True])
def test_deals(data: int, interleaved: bool) -> None:
    """Checks the micro-batches of `deals`.

    Ranks have equal numbers of micro-batches, at least one per stage. All samples and all orders occur.
    """
    layout = Layout(1, 4, data, interleaved=interleaved)
    first_kinds = set()
    for number in range(24):
        for deal in deals(layout, number):
            assert len({len(share) for share in deal}) == 1 and len(deal) == data
            assert len(deal[0]) % 4 == 0 if interleaved else len(deal[0]) >= 4
            assert sorted(i for share in deal for numbers in share for i in numbers) == list(range(len(MIXES)))
            kinds = [tuple(numbers[0] % 4 for numbers in share) for share in deal]
            first_kinds.add(tuple(dict.fromkeys(kinds[0])))
            assert data == 1 or all(a != b for a, b in zip(*kinds, strict=True)), "ranks see different kinds"
    assert first_kinds == set(ORDERS)


def test_all_orders_occur_in_the_matrix() -> None:
    cells = [(cell, i) for layout in all_layouts() for i, cell in enumerate(matrix_cells(layout))]
    assert {deal_number(cell, i) % 24 for cell, i in cells if cell.zero_stage == 3} == set(range(24))
