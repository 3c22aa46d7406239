"""bf16 under a layout of ranks is at most twice as far from fp32 as bf16 in one process."""

import functools

import pytest
from torch import Tensor

from tests.ranks import run_ranks
from tests.training.layouts import Layout, deals
from tests.training.steps import Reference, config_for, measure_steps, norm_of_all

MODEL = "paper"
ONE_PROCESS = Layout(1, 1, 1)


def measure_first_step(layout: Layout, zero_stages: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """On one rank: the first step only. Later ones start from other weights, as Adam takes full steps where bf16
    rounds a tiny gradient to another sign.
    """
    from beit3_ds.training.engine import init_process_group

    mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    found = [
        measure_steps(config_for(stage, MODEL, bf16=True, **layout.parallel), mesh, deals(layout, 1), num_steps=1)
        for stage in zero_stages
    ]
    mesh.close()
    return found


def errors(layout: Layout, zero_stages: tuple[int, ...], expected: dict[str, Tensor]) -> list[dict[str, float]]:
    """Relative errors, for every ZeRO stage: of the losses and all gradients in the 2-norm, and of the clip norm."""
    return [
        _errors(functools.reduce(dict.__or__, ranks), expected)
        for ranks in zip(*run_ranks(measure_first_step, layout.num_ranks, layout, zero_stages), strict=True)
    ]


def _errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    difference = {name: value.float() - expected[name] for name, value in found.items()}
    kinds = ("loss 0", "norm 0", "gradient 0")
    return {kind: norm_of_all(difference, kind) / norm_of_all(expected, kind) for kind in kinds}


@pytest.fixture(scope="module")
def one_process(reference: Reference) -> dict[str, float]:
    """About 1.1e-5 of the losses, 1.6e-3 of the norm and 7.3e-3 of the gradients, whatever the ZeRO stage."""
    stages = errors(ONE_PROCESS, (0, 3), reference.load(MODEL))
    for found in stages:
        assert found["loss 0"] < 1e-4 and found["norm 0"] < 5e-3 and found["gradient 0"] < 0.02, found
    return stages[-1]


@pytest.mark.parametrize(
    ("layout", "zero_stages"),
    [
        (Layout(2, 1, 1), (0, 1, 3)),
        (Layout(1, 2, 2), (3,)),
        pytest.param(Layout(2, 2, 2, sequence_parallel=True), (3,), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bf16(
    layout: Layout, zero_stages: tuple[int, ...], reference: Reference, one_process: dict[str, float]
) -> None:
    """ZeRO-0 catches a norm of unmarked gradients, 4% off; a reduction in a narrower type shows in the gradients."""
    for stage, found in zip(zero_stages, errors(layout, zero_stages, reference.load(MODEL)), strict=True):
        times = {kind: error / one_process[kind] for kind, error in found.items()}
        print(f"{layout}, ZeRO-{stage}: errors {found}, times those of one process: {times}")
        assert max(times.values()) <= 2, f"{layout}, ZeRO-{stage}: {times} times the errors of one process"
