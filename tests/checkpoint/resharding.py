"""Saves under one layout and resumes under another; compares with the state as DeepSpeed gathers it."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.checkpoint.engine_state import EngineState
from beit3_ds.checkpoint.run_description import RunDescription
from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.config import RunConfig
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from tests.training.layouts import Layout, deals
from tests.training.steps import accumulate_step, config_for, logical_tensors

MODEL = "tied"  # vision-language experts, and a table that the first and the last stage share
NUM_LAYERS = 4  # one for each of four stages
STEPS_BEFORE, STEPS_AFTER = 2, 2  # the second step after loading shows wrong moments
MOMENTS = ("exp_avg", "exp_avg_sq")


class Setup(NamedTuple):
    """Describes a layout of ranks, and the form in which it keeps the training state."""

    layout: Layout
    zero_stage: int
    bf16: bool = False

    def __str__(self) -> str:
        return f"{self.layout} ZeRO-{self.zero_stage}{' bf16' if self.bf16 else ''}"

    @property
    def folder(self) -> str:
        return str(self).replace(" ", "_")

    def config(self, seed: int = 1) -> RunConfig:
        config = config_for(self.zero_stage, MODEL, bf16=self.bf16, **self.layout.parallel)
        # Norms and biases stay whole under ZeRO-3, as parameters of a checkpoint that was loaded have to as well.
        zero = {**config.deepspeed["zero_optimization"], "stage3_param_persistence_threshold": 64}
        return dataclasses.replace(
            config,
            backbone=dataclasses.replace(config.model, num_layers=NUM_LAYERS),
            training=dataclasses.replace(config.training, seed=seed),
            deepspeed={**config.deepspeed, "zero_optimization": zero},
        )


class Saved(NamedTuple):
    """Holds losses and state of the run that saved a checkpoint."""

    tensors: dict[str, Tensor]
    """Logical weights and moments of the first data-parallel rank, as DeepSpeed gathers them."""
    losses: list[Tensor]
    """Losses of the steps after the save, in the uninterrupted run."""


def save_and_resume(setup: Setup, root: Path) -> Saved:
    """Trains, saves and continues to train, on one rank."""
    mesh, schedule, state, store = start(setup, root / setup.folder, seed=1)
    train(setup, schedule, mesh, range(STEPS_BEFORE))
    tensors = gather_state(schedule, mesh, setup)
    store.save(state, STEPS_BEFORE)
    losses = train(setup, schedule, mesh, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
    store.finish()
    (outcome,) = store.take_outcomes()
    assert outcome.error is None, outcome.error
    mesh.close()
    return Saved(tensors, losses)


def load_and_resume(setup: Setup, root: Path, sources: list[Setup]) -> list[Saved]:
    """Loads the checkpoint of each source over other initial values and continues to train, on one rank."""
    mesh: Mesh | None = None
    results = []
    for source in sources:
        mesh, schedule, state, store = start(setup, root / source.folder, seed=2, mesh=mesh)
        newest = store.agree_on_newest()
        assert newest is not None
        assert store.load(state, newest) == STEPS_BEFORE
        tensors = gather_state(schedule, mesh, setup)
        losses = train(setup, schedule, mesh, range(STEPS_BEFORE, STEPS_BEFORE + STEPS_AFTER))
        results.append(Saved(tensors, losses))
        schedule.engine.destroy()
    assert mesh is not None
    mesh.close()
    return results


def start(
    setup: Setup, folder: Path, *, seed: int, mesh: Mesh | None = None
) -> tuple[Mesh, Schedule, EngineState, CheckpointStore]:
    """Builds an engine with initial values drawn from `seed`, and opens the checkpoints in `folder`."""
    from beit3_ds.runtime.process_group import init_process_group
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_schedule

    config = setup.config(seed)
    mesh = mesh or init_process_group(config.parallel)
    schedule = build_schedule(build_task(config), mesh)
    model = dataclasses.asdict(config.model)
    run = RunDescription(model=model, config={}, tokenizers={}, layout=mesh.describe_layout(), versions={})
    store = CheckpointStore(folder, 1, mesh, run, 300)
    return mesh, schedule, EngineState(schedule.engine, mesh), store


def train(setup: Setup, schedule: Schedule, mesh: Mesh, steps: range) -> list[Tensor]:
    """Trains for the given steps on this layout's samples; returns the losses of each step."""
    from beit3_ds.training.engine import apply_update

    losses, config = [], setup.config()
    for step in steps:
        deal = deals(setup.layout, 0)[step % 3]
        losses.append(accumulate_step(schedule, config, mesh, deal, step))
        apply_update(schedule.engine, mesh)
    return losses


def gather_state(
    schedule: Schedule, mesh: Mesh, setup: Setup, kinds: Sequence[str] = ("weight", *MOMENTS)
) -> dict[str, Tensor]:
    """Returns undivided weights and moments, and the parameters of the forward pass, of this rank's stage."""
    import deepspeed

    engine = schedule.engine
    named = dict(engine.module.named_parameters())
    result: dict[str, Tensor] = {}
    for kind in kinds:
        parts = {name: _gathered(engine, parameter, kind, setup) for name, parameter in named.items()}
        result |= logical_tensors(parts, named, mesh, kind)
    with deepspeed.zero.GatheredParameters(list(named.values())):
        parts = {name: parameter.detach().clone() for name, parameter in named.items()}
    used = logical_tensors(parts, named, mesh, "used")
    if not setup.bf16:
        for name in named:
            assert torch.equal(used[f"used {name}"], result[f"weight {name}"]), f"{name}: stale parameter"
    return result | used


def _gathered(engine: Any, parameter: Any, kind: str, setup: Setup) -> Tensor:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    optimizer = engine.optimizer
    if setup.zero_stage == 0:
        master = _master(optimizer, parameter) if setup.bf16 else parameter
        inner = optimizer.optimizer if setup.bf16 else optimizer
        return master.detach() if kind == "weight" else inner.state[master][kind]
    if setup.zero_stage < 3:
        # DeepSpeed links moments to parameters in the first update, before the second group has any.
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()
    if kind == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, kind)


def _master(optimizer: Any, parameter: Any) -> Tensor:
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    pairs = itertools.chain.from_iterable(zip(*group, strict=True) for group in groups)
    return next(master for narrow, master in pairs if narrow is parameter)
