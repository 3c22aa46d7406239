"""A step is that of one process if data-parallel ranks or micro-batches have different numbers of samples, or none."""

from typing import Any

import pytest

from beit3_ds.config import MicroBatchSize, StepShares
from beit3_ds.parallel import Mesh
from tests.ranks import run_ranks
from tests.training.layouts import Layout
from tests.training.steps import MIXES, Deal, Reference, check, config_for, measure_steps

MICRO_BATCHES = 4
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def deals(ranks: int) -> list[Deal]:
    """The eight samples of three steps: as a run shares them, with empty micro-batches first, and as few as one rank's.

    The last step leaves ranks without any sample, which a run refuses because it is a waste, not because it is wrong.
    """
    shares = StepShares(samples=MicroBatchSize(0, 0, len(MIXES)), num_ranks=ranks, num_micro_batches=MICRO_BATCHES)
    as_run = [[list(cell["texts"]) for cell in shares.slots(rank)] for rank in range(ranks)]
    empty_first = [list(reversed(rank)) for rank in reversed(as_run)]
    one_has_all: Deal = [[[0, 1, 2], [], [3, 4], [5, 6, 7]], *([[]] * MICRO_BATCHES for _ in range(ranks - 1))]
    return [as_run, empty_first, one_has_all]


Variants = list[tuple[int, dict[str, Any]]]
"""ZeRO stages, each with more keys of `zero_optimization`."""
STAGES: Variants = [(stage, {}) for stage in range(4)]
OFFLOADED: Variants = [(stage, OFFLOAD) for stage in (1, 2, 3)]


def measure(layout: Layout, variants: Variants, reference: Reference) -> list[dict[str, float]]:
    """On one rank: how much of the allowed error each loss, norm, gradient and weight has."""
    from beit3_ds.training.engine import init_process_group

    mesh: Mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    results = []
    for zero_stage, keys in variants:
        config = config_for(zero_stage, **layout.parallel)
        zero = config.deepspeed["zero_optimization"]
        zero.update(keys)
        results.append(reference.ratios(measure_steps(config, mesh, deals(layout.data)), "paper"))
    mesh.close()
    return results


def run(layout: Layout, variants: Variants, reference: Reference) -> None:
    results = run_ranks(measure, layout.num_ranks, layout, variants, reference, timeout=1500)
    for variant, ratios in zip(variants, zip(*results, strict=True), strict=True):
        worst = check(ratios, reference.load("paper"), f"{layout}, ZeRO {variant}")
        print(f"{layout}, ZeRO {variant}: worst error {worst:.2f} of the bound")


@pytest.mark.parametrize("ranks", [3])
def test_data_parallel_ranks(ranks: int, reference: Reference) -> None:
    """A mean of the ranks' means instead of the step's mean shows in loss, gradients and norm."""
    run(Layout(1, 1, ranks), STAGES, reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "variants"),
    [
        (Layout(1, 1, 7), STAGES),
        (Layout(1, 1, 7), OFFLOADED),
        (Layout(2, 1, 3), STAGES),
        (Layout(2, 1, 3, sequence_parallel=True), STAGES),
        (Layout(1, 2, 3), STAGES),
        (Layout(1, 2, 3, interleaved=True), STAGES),
        (Layout(2, 2, 3), STAGES),
        (Layout(2, 1, 7), STAGES),
        (Layout(1, 2, 7), STAGES),
    ],
    ids=str,
)
def test_layouts(layout: Layout, variants: Variants, reference: Reference) -> None:
    """Seven of eight data-parallel ranks, and layouts with tensor-parallel ranks and stages."""
    run(layout, variants, reference)
