"""Saves, exports, loads and resumes runs under DeepSpeed options that change how the training state is stored."""

import copy
import dataclasses
import itertools
import json
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from beit3_ds.config import RunConfig, build_run_config
from beit3_ds.config.deepspeed_keys import AcceptedKey, accepted_keys
from beit3_ds.parallel import Mesh
from beit3_ds.pipeline.schedule import Schedule
from tests.run_config import small_run_mapping
from tests.training.layouts import Layout, deals
from tests.training.steps import CLIP, LEARNING_RATE, accumulate_step

LAYOUT = Layout(1, 1, 2)
STEPS_BEFORE, STEPS_AFTER = 2, 2
SIZES = {"num_layers": 2, "num_attention_heads": 4, "drop_path_rate": 0.2, "tie_word_embeddings": True}
SECTIONS = ("zero_optimization", "bf16", "data_types", "communication_data_type")
CHOSEN_BY_CELL = ("zero_optimization.stage", "bf16.enabled")


class KeyCell(NamedTuple):
    """Holds DeepSpeed options for one ZeRO stage and precision."""

    options: tuple[tuple[str, Any], ...]
    """Pairs of a key in DeepSpeed's configuration, with nested keys joined by dots, and a value."""
    stage: int
    bf16: bool = False

    def __str__(self) -> str:
        options = ", ".join(f"{key}={json.dumps(value)}" for key, value in self.options)
        return f"ZeRO-{self.stage}{' bf16' if self.bf16 else ''} {options}"

    @property
    def plain(self) -> "KeyCell":
        """Returns the cell without its options."""
        return KeyCell((), self.stage, self.bf16)

    @property
    def elsewhere(self) -> "KeyCell":
        """Returns a second cell that loads the state in float32 and divides it differently."""
        return KeyCell((), 1 if self.stage == 3 else 3)

    def config(self, seed: int) -> RunConfig:
        """Returns the configuration of a run with the options, validated like a user's."""
        mapping = copy.deepcopy(small_run_mapping(self.stage, accumulation=4, **SIZES))
        mapping["gradient_clipping"] = CLIP
        if self.bf16:
            mapping["bf16"] = {"enabled": True}
        for key, value in self.options:
            section, *path = mapping, *key.split(".")
            for name in path[:-1]:
                section = section.setdefault(name, {})
            section[path[-1]] = value
        mapping["beit3_ds"]["parallel"] = LAYOUT.parallel
        mapping["beit3_ds"]["training"] |= {"learning_rate": LEARNING_RATE, "seed": seed}
        return build_run_config(mapping)


def cells_of(key: AcceptedKey) -> Iterator[KeyCell]:
    """Yields a cell for every sample value of a key, in every ZeRO stage where the key has an effect.

    Each value is tested in float32 and in bf16, where both are allowed.
    """
    for stage, value in itertools.product(key.spec.stages, key.spec.samples):
        for bf16 in (False, True):
            if (cell := _fit(((key.name, value),), stage, bf16)) is not None:
                yield cell


def joint_cells() -> Iterator[KeyCell]:
    """Yields six cells, two per stage: one sets all keys to their first samples, and one to their last samples."""
    for stage, which in itertools.product((1, 2, 3), (0, -1)):
        found = [key for key in state_keys() if stage in key.spec.stages and key.spec.samples]
        options = tuple((key.name, key.spec.samples[which]) for key in found if key.name not in CHOSEN_BY_CELL)
        cell = _fit(options, stage, bf16=which == -1)
        assert cell is not None
        yield cell


def state_keys() -> list[AcceptedKey]:
    """Returns the accepted keys that may change the place or dtype of weights, moments and gradients."""
    return [key for key in accepted_keys() if key.path[0] in SECTIONS]


def _fit(options: tuple[tuple[str, Any], ...], stage: int, bf16: bool) -> KeyCell | None:
    """Returns a cell with compatible options, or None if they contradict the stage or precision."""
    chosen = dict(options)
    if chosen.get("zero_optimization.stage", stage) != stage or chosen.get("bf16.enabled", bf16) != bf16:
        return None
    sums = chosen.get("data_types.grad_accum_dtype")
    if sums is not None and ((sums == "bf16" and not bf16) or (sums == "fp32" and bf16 and stage == 0)):
        if len(options) == 1:
            return None
        options = tuple((key, value) for key, value in options if key != "data_types.grad_accum_dtype")
    for section in ("offload_param", "offload_optimizer"):
        pinned = f"zero_optimization.{section}.pin_memory"
        if pinned in chosen and f"zero_optimization.{section}.device" not in chosen:
            options += ((f"zero_optimization.{section}.device", "cpu"),)
    return KeyCell(options, stage, bf16)


class Trained(NamedTuple):
    """Holds the results of a few training steps."""

    losses: list[Tensor]
    weights: dict[str, Tensor]
    """Undivided weights, as the forward pass uses them."""


def check_cells(cells: list[KeyCell], root: Path) -> list[str | None]:
    """Checks cells on one of two ranks; returns the error of each cell, or None."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh = init_process_group(KeyCell((), 0).config(1).parallel)
    plain: dict[KeyCell, list[Tensor]] = {}
    faults: list[str | None] = []
    for number, cell in enumerate(cells):
        try:
            if cell.plain not in plain:
                plain[cell.plain] = _train(cell.plain, _start(cell.plain, mesh, root / "plain", 1), mesh, 0).losses
            _check_cell(cell, mesh, root / str(number), plain[cell.plain])
            faults.append(None)
        except Exception:
            faults.append(traceback.format_exc())
    mesh.close()
    return faults


def _check_cell(cell: KeyCell, mesh: Mesh, folder: Path, plain_losses: list[Tensor]) -> None:
    schedule, state, store = started = _start(cell, mesh, folder, 1)
    before = _train(cell, started, mesh, 0)
    for loss, expected in zip(before.losses, plain_losses, strict=True):
        torch.testing.assert_close(loss, expected, rtol=2e-2 if cell.bf16 else 1e-4, atol=0)
    store.save(state, STEPS_BEFORE)
    store.finish()
    (outcome,) = store.take_outcomes()
    assert outcome.error is None, outcome.error
    uninterrupted = _train(cell, started, mesh, STEPS_BEFORE)
    schedule.engine.destroy()
    _check_exported(outcome.path, before.weights, folder, mesh)

    resumed = _start(cell, mesh, folder, 2)
    _load(resumed, "loading")
    _check_equal(_live_weights(resumed[0]), before.weights, "loaded")
    after = _train(cell, resumed, mesh, STEPS_BEFORE)
    assert all(map(torch.equal, after.losses, uninterrupted.losses)), "the resumed run's losses are others"
    _check_equal(after.weights, uninterrupted.weights, "resumed")
    resumed[0].engine.destroy()

    other = _start(cell.elsewhere, mesh, folder, 3)
    _load(other, "loading elsewhere")
    _check_equal(_live_weights(other[0]), before.weights, "loaded under another layout")
    other[0].engine.destroy()


def _start(cell: KeyCell, mesh: Mesh, folder: Path, seed: int) -> Any:
    from beit3_ds.checkpoint.engine_state import EngineState
    from beit3_ds.checkpoint.run_description import RunDescription
    from beit3_ds.checkpoint.store import CheckpointStore
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_schedule

    config = cell.config(seed)
    schedule = build_schedule(build_task(config), mesh)
    run = RunDescription(
        model=dataclasses.asdict(config.model), config={}, tokenizers={}, layout=mesh.describe_layout(), versions={}
    )
    return schedule, EngineState(schedule.engine, mesh), CheckpointStore(folder, 1, mesh, run, 300)


def _load(started: Any, what: str) -> None:
    _, state, store = started
    newest = store.agree_on_newest()
    assert newest is not None, what
    assert store.load(state, newest) == STEPS_BEFORE, what


def _train(cell: KeyCell, started: Any, mesh: Mesh, first: int) -> Trained:
    from beit3_ds.training.engine import apply_update

    schedule, config, losses = started[0], cell.config(1), []
    for step in range(first, first + (STEPS_AFTER if first else STEPS_BEFORE)):
        losses.append(accumulate_step(schedule, config, mesh, deals(LAYOUT, 0)[step % 3], step))
        apply_update(schedule.engine, mesh)
    return Trained(losses, _live_weights(schedule))


def _live_weights(schedule: Schedule) -> dict[str, Tensor]:
    import deepspeed

    named = dict(schedule.engine.module.named_parameters())
    with deepspeed.zero.GatheredParameters(list(named.values())):
        return {name: parameter.detach().clone() for name, parameter in named.items()}


def _check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], what: str) -> None:
    """Compares tensors in the dtype of `expected`, which may be narrower than that of `found`."""
    assert found.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert torch.equal(found[name].to(tensor.dtype), tensor), f"{what}: {name} differs"


def _check_exported(path: Path, weights: dict[str, Tensor], folder: Path, mesh: Mesh) -> None:
    """Checks on the main rank that exported weights equal the trained weights."""
    from beit3_ds.checkpoint.folder import open_checkpoint
    from beit3_ds.tasks.pretraining.model import PretrainingModel
    from beit3_ds.weights.export import export_weights

    if mesh.is_main:
        export_weights(open_checkpoint(path), folder / "exported.safetensors")
        model = PretrainingModel.from_pretrained(folder / "exported.safetensors")
        vocabulary = model.config.text_vocab_size
        exported = {name: parameter.detach() for name, parameter in model.named_parameters()}
        live = {name: tensor[:vocabulary] if "word" in name else tensor for name, tensor in weights.items()}
        _check_equal(exported, live, "exported")
