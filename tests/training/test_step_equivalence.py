"""Tests that the number of data-parallel ranks or micro-batches, and the ZeRO stage, do not change a step.

Compares losses, gradients and gradient norms.
"""

import itertools

import pytest

from tests.ranks import run_ranks
from tests.training.steps import SHALLOW, Deal, Reference, check, config_for, measure_steps

# Each entry deals the samples of the three steps; shares are those of the data-parallel ranks.
ORDERS = list(itertools.permutations(range(3)))  # of image-only, pair-only and text-only micro-batches
ONE_RANK: list[list[Deal]] = [
    [[[[0, 1, 2, 3, 4, 5, 6, 7]]], [[[0, 1, 2, 3], [4, 5, 6, 7]]], [[[0, 1], [2, 3], [4, 5], [6, 7]]]],
    *([[[[i, i + 4] for i in order] + [[3], [7]]] for order in orders] for orders in (ORDERS[:3], ORDERS[3:])),
]
TWO_RANKS: list[list[Deal]] = [
    [[[[0, 1, 2, 3]], [[4, 5, 6, 7]]], [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]],
    # ranks see different modalities at the same time
    *(
        [[[[i] for i in order] + [[3]], [[i + 4] for i in reversed(order)] + [[7]]] for order in orders]
        for orders in (ORDERS[:3], ORDERS[3:])
    ),
]


ALL = list(itertools.product(range(4), range(3)))
"""Every ZeRO stage with every division of the samples."""
FEW = [cell for cell in ALL if cell[0] == 3 or cell[0] == cell[1]]
"""ZeRO-3 with every division of the samples, and each other stage with one.

So every division also occurs with flat buffers.
"""


def measure_stages(
    dealings: list[list[Deal]], cells: list[tuple[int, int]], reference: Reference
) -> list[tuple[str, dict[str, float]]]:
    """Measures ZeRO stages with several divisions of the samples on one rank; returns names and error ratios."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(config_for(0).parallel)
    results = []
    for zero_stage, number in cells:
        found = measure_steps(config_for(zero_stage, num_layers=SHALLOW), mesh, dealings[number])
        results.append((f"ZeRO-{zero_stage}, dealing {number}", reference.ratios(found, "paper", SHALLOW)))
    mesh.close()
    return results


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("cells", [pytest.param(FEW, id="few"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
def test_step(ranks: int, cells: list[tuple[int, int]], reference: Reference) -> None:
    """Catches a wrong loss factor (gradient norm; Adam hides it) and a stale ZeRO-3 buffer (second step)."""
    names, dealings = reference.load("paper", SHALLOW), [ONE_RANK, TWO_RANKS][ranks - 1]
    for results in zip(*run_ranks(measure_stages, ranks, dealings, cells, reference), strict=True):
        check([ratios for _, ratios in results], names, results[0][0])
