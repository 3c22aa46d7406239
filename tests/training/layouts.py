"""Lists the layouts whose steps are compared with one process, and a small subset that covers all option pairs."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from beit3_ds.parallel import Mesh
from tests.training.steps import MODELS, NUM_LAYERS, SHALLOW, Deal, Reference, config_for, measure_steps

ZERO_STAGES = (0, 1, 2, 3)
CHECKPOINTING = ("none", "full")
MAX_RANKS = 8

Pair = tuple[int, Any, int, Any]
"""Two options of a cell, each as its position in the cell and its value."""


class Layout(NamedTuple):
    """Describes how ranks divide the model; tests start the processes of a layout once."""

    tensor: int
    pipeline: int
    data: int
    sequence_parallel: bool = False
    interleaved: bool = False

    @property
    def num_ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def parallel(self) -> dict[str, Any]:
        """Returns the parallel section of the configuration."""
        return {
            "tensor_parallel_size": self.tensor,
            "pipeline_parallel_size": self.pipeline,
            "virtual_pipeline_parallel_size": 2 if self.interleaved else 1,
            "sequence_parallel": self.sequence_parallel,
            "timeout_seconds": 300,
        }

    def __str__(self) -> str:
        flags = " sp" * self.sequence_parallel + " interleaved" * self.interleaved
        return f"tp{self.tensor} pp{self.pipeline} dp{self.data}{flags}"


class Cell(NamedTuple):
    """Describes one comparison: a layout, and options that the processes of the layout can vary."""

    layout: Layout
    zero_stage: int
    model: str
    checkpointing: str

    @property
    def pairs(self) -> set[Pair]:
        """Returns every pair of options with their values in this cell."""
        return _pairs((*self.layout, *self[1:]))

    def __str__(self) -> str:
        recomputing = "" if self.checkpointing == "none" else f", checkpointing {self.checkpointing}"
        return f"{self.layout}, ZeRO-{self.zero_stage}, {self.model}{recomputing}"


def all_layouts() -> Iterator[Layout]:
    """Yields every layout of up to 8 ranks.

    Sequence parallelism needs tensor-parallel ranks, and interleaving needs pipeline stages.
    """
    for tensor, pipeline, data in itertools.product((1, 2, 4), (1, 2, 4), (1, 2)):
        if tensor * pipeline * data <= MAX_RANKS:
            for sequence, interleaved in itertools.product((False, True), repeat=2):
                if (tensor > 1 or not sequence) and (pipeline > 1 or not interleaved):
                    yield Layout(tensor, pipeline, data, sequence, interleaved)


def all_cells() -> list[Cell]:
    """Returns every valid combination of layout and options."""
    return [Cell(*values) for values in itertools.product(all_layouts(), ZERO_STAGES, MODELS, CHECKPOINTING)]


def matrix_cells(layout: Layout) -> list[Cell]:
    """Returns the cells of the full matrix: all ZeRO stages for two models, one stage for each of the other two.

    Half of the cells use activation checkpointing.
    """
    turns = ("none", "full")
    number = list(all_layouts()).index(layout)
    models = [(stage, model) for stage in ZERO_STAGES for model in ("paper", "decoupled")]
    models += [(number % 4, "sub-LN"), ((number + number // 4) % 4, "tied")]
    return [Cell(layout, stage, model, turns[(number + i + i // 4) % 2]) for i, (stage, model) in enumerate(models)]


PAIRWISE_CELLS = [
    Cell(Layout(1, 1, 1), 0, "tied", "full"),
    Cell(Layout(1, 1, 1), 1, "sub-LN", "none"),
    Cell(Layout(1, 1, 2), 1, "decoupled", "full"),
    Cell(Layout(1, 2, 1, interleaved=True), 0, "paper", "none"),
    Cell(Layout(1, 2, 1, interleaved=True), 2, "sub-LN", "full"),
    Cell(Layout(1, 2, 1, interleaved=True), 3, "decoupled", "none"),
    Cell(Layout(2, 1, 1, sequence_parallel=True), 3, "sub-LN", "full"),
    Cell(Layout(1, 2, 2), 2, "tied", "none"),
    Cell(Layout(1, 4, 1), 1, "paper", "full"),
    Cell(Layout(1, 4, 1), 2, "sub-LN", "none"),
    Cell(Layout(2, 1, 2, sequence_parallel=True), 2, "paper", "none"),
    Cell(Layout(2, 2, 1, interleaved=True), 1, "tied", "none"),
    Cell(Layout(4, 1, 1), 2, "decoupled", "full"),
    Cell(Layout(4, 1, 1), 3, "paper", "none"),
    Cell(Layout(1, 4, 2, interleaved=True), 3, "tied", "none"),
    Cell(Layout(2, 4, 1, sequence_parallel=True, interleaved=True), 0, "decoupled", "none"),
    Cell(Layout(4, 1, 2), 0, "sub-LN", "none"),
    Cell(Layout(4, 2, 1, sequence_parallel=True, interleaved=True), 1, "tied", "none"),
]
"""Cells that cover every valid pair of two options' values; no cheaper set is known.

A search minimised their processor time. The time grows with the number of ranks, doubles with tensor parallelism, and
grows by a third with recomputation.
"""


def pairwise_cells() -> dict[Layout, list[Cell]]:
    """Groups `PAIRWISE_CELLS` by layout."""
    layouts = dict.fromkeys(cell.layout for cell in PAIRWISE_CELLS)
    return {layout: [cell for cell in PAIRWISE_CELLS if cell.layout == layout] for layout in layouts}


def _pairs(values: Iterable[Any]) -> set[Pair]:
    return {(i, a, j, b) for (i, a), (j, b) in itertools.combinations(enumerate(values), 2)}


ORDERS = list(itertools.permutations(range(4)))


def deals(layout: Layout, number: int) -> list[Deal]:
    """Returns the micro-batches of three steps, in an order that depends on the step and on `number`.

    The micro-batches are image-only, pair-only, text-only and mixed. Data-parallel ranks see different kinds at the
    same time. Any 24 consecutive numbers give all 24 orders.
    """
    orders = [ORDERS[(5 * number + 7 * step) % len(ORDERS)] for step in range(3)]
    if layout.data == 2:
        return [[[[i] for i in order], [[i + 4] for i in order[1:] + order[:1]]] for order in orders]
    whole = [[[i, i + 4] for i in order] for order in orders]
    if layout.interleaved or number % 3:
        return [[micro_batches] for micro_batches in whole]
    # Five micro-batches are no multiple of the stages.
    return [[[*micro_batches[:3], micro_batches[3][:1], micro_batches[3][1:]]] for micro_batches in whole]


def deal_number(cell: Cell, position: int) -> int:
    """Returns the number for `deals`; it differs between the cells of a layout and varies between layouts."""
    return position + 7 * list(all_layouts()).index(cell.layout)


def pairwise_depth(layout: Layout) -> int:
    """Returns the number of blocks of the models for a layout of `PAIRWISE_CELLS`."""
    return NUM_LAYERS if layout.pipeline > 1 else SHALLOW


def measure_cells(cells: list[Cell], reference: Reference, num_layers: int = NUM_LAYERS) -> list[dict[str, float]]:
    """Runs the cells of one layout on one rank; returns each tensor's error as a fraction of the allowed error."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh: Mesh = init_process_group(config_for(0, **cells[0].layout.parallel).parallel)
    results = []
    for position, cell in enumerate(cells):
        parallel = cell.layout.parallel
        config = config_for(cell.zero_stage, cell.model, cell.checkpointing, num_layers=num_layers, **parallel)
        found = measure_steps(config, mesh, deals(cell.layout, deal_number(cell, position)))
        results.append(reference.ratios(found, cell.model, num_layers))
    mesh.close()
    return results
