"""Tests that a NaN in the gradients of one rank skips the update on all ranks and changes nothing else."""

import copy
import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.config import RunConfig
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.gradient_probe import GradientProbe
from tests.ranks import run_ranks
from tests.training.layouts import Layout
from tests.training.steps import Deal, accumulate_step, config_for

DATA, TENSOR, PIPELINE = Layout(1, 1, 2), Layout(2, 1, 1), Layout(1, 2, 1)
STEPS, FAULTY_STEP, FAULTY_MICRO_BATCH = (0, 1, 2), 1, 1
DEALS: dict[int, Deal] = {1: [[[0, 1, 2, 3], [4, 5, 6, 7]]], 2: [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]}
BF16 = {"bf16": {"enabled": True}}
FP32_ACCUMULATION = {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}  # another of DeepSpeed's optimizers
UNCHECKED = {"bf16": {"enabled": True, "check_grad_overflow": False}}


class Fault:
    """Replaces the gradient of one parameter by NaN, once, before the finiteness check sees it.

    Only the rank that holds the parameter does this.
    """

    def __init__(self, *, is_here: bool) -> None:
        self.is_here, self.is_due, self.backward_passes = is_here, False, 0

    def plant(self, patch: pytest.MonkeyPatch) -> None:
        watch, fault = GradientProbe.watch, self

        def watch_after_fault(probe: GradientProbe, leaves: Iterable[Tensor]) -> None:
            leaves = list(leaves)
            if len(leaves) > 1:  # not the copy of a tied table
                leaves[len(leaves) // 2].register_hook(fault.strike)
            watch(probe, leaves)

        patch.setattr(GradientProbe, "watch", watch_after_fault)

    def strike(self, gradient: Tensor) -> Tensor:
        number, self.backward_passes = self.backward_passes, self.backward_passes + 1
        struck = self.is_here and self.is_due and number == FAULTY_MICRO_BATCH
        return torch.full_like(gradient, math.nan) if struck else gradient


def run_steps(
    config: RunConfig, mesh: Mesh, steps: Iterable[int], fault: Fault
) -> tuple[dict[str, Tensor], int, dict[int, tuple[float, list[int]]]]:
    """Returns this rank's final state, AdamW's step count, and the norm and suspected ranks of each step."""
    from beit3_ds.checkpoint.engine_state import EngineState
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import apply_update, build_schedule

    with pytest.MonkeyPatch.context() as patch:
        fault.plant(patch)
        schedule = build_schedule(build_task(config), mesh)
    found = {}
    for step in steps:
        fault.is_due, fault.backward_passes = step == FAULTY_STEP, 0
        accumulate_step(schedule, config, mesh, DEALS[mesh.data_parallel_size], step)
        found[step] = (apply_update(schedule.engine, mesh), schedule.probe.find_non_finite())
    state = EngineState(schedule.engine, mesh)
    owned = {
        f"{kind} {fragment.name} {fragment.start}": fragment.values(kind).clone()
        for fragment in state._fragments()
        for kind in ("weight", "exp_avg", "exp_avg_sq")
    }
    parameters = {name: p.detach().clone() for name, p in schedule.engine.module.named_parameters()}
    optimizer_step = state.optimizer_step
    schedule.engine.destroy()
    return owned | parameters, optimizer_step, found


def compare(layout: Layout, cells: list[tuple[int, dict[str, Any], dict[str, Any]]]) -> list[Any]:
    """Compares steps with a fault on the last rank with steps without the faulty step, on one rank."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(config_for(0, **layout.parallel).parallel)
    results = []
    for zero_stage, zero, deepspeed in cells:
        # The copy of a tied table on the last stage is float32, which only ZeRO casts the stream to.
        model = "paper" if deepspeed else "tied"
        config = copy.deepcopy(config_for(zero_stage, model, **layout.parallel))
        config.deepspeed["zero_optimization"].update(zero)
        config.deepspeed.update(deepspeed)  # type: ignore[attr-defined]
        fault = Fault(is_here=mesh.num_ranks - 1 == torch.distributed.get_rank())
        faulty, count, found = run_steps(config, mesh, STEPS, fault)
        steps = [step for step in STEPS if step != FAULTY_STEP]
        expected, expected_count, expected_found = run_steps(config, mesh, steps, Fault(is_here=False))
        different = [name for name in expected if not torch.equal(faulty[name], expected[name])]
        results.append((different, count, expected_count, found, expected_found))
    mesh.close()
    return results


Cells = list[tuple[int, dict[str, Any], dict[str, Any]]]
QUICK: list[tuple[Layout, Cells]] = [
    (DATA, [(0, {}, {}), (3, {}, BF16)]),
]
PERSISTENT = {"stage3_param_persistence_threshold": 40}  # some parameters stay whole
SLOW: list[tuple[Layout, Cells]] = [
    (DATA, [(1, {}, {}), (2, {}, {}), (3, {}, {}), (3, PERSISTENT, {})]),
    (DATA, [(0, {}, BF16), (1, {}, BF16), (2, {}, UNCHECKED), (1, {}, FP32_ACCUMULATION)]),
    (TENSOR, [(0, {}, {}), (1, {}, {}), (0, {}, BF16), (3, {}, BF16)]),
    (PIPELINE, [(0, {}, {}), (0, {}, BF16), (1, {}, UNCHECKED), (3, {}, {})]),
]


@pytest.mark.parametrize(
    ("layout", "cells"), [*QUICK, *(pytest.param(*values, marks=pytest.mark.slow) for values in SLOW)]
)
def test_fault_on_one_rank(layout: Layout, cells: Cells) -> None:
    """Catches a NaN that stays in a buffer (norm of the last step), and a rank that does the update (state)."""
    for cell, ranks in zip(cells, zip(*run_ranks(compare, 2, layout, cells), strict=True), strict=True):
        for rank, (different, count, expected_count, found, expected_found) in enumerate(ranks):
            where = f"{layout}, {cell}, rank {rank}"
            norms = {step: norm for step, (norm, _) in found.items()}
            assert not math.isfinite(norms.pop(FAULTY_STEP)), where
            assert norms == {step: norm for step, (norm, _) in expected_found.items()}, where
            assert count == expected_count == 2, where
            assert not different, f"{where}: {different}"
            suspects = {step: suspected for step, (_, suspected) in found.items()}
            named = [FAULTY_MICRO_BATCH] if rank == 1 else []
            assert suspects == {0: [], FAULTY_STEP: named, 2: []}, where
