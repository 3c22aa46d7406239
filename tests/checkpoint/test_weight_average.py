"""Tests moving averages and optimizer groups in every layout: values, evaluation, checkpoints and resuming."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_ds.checkpoint.folder import CheckpointFolder, open_checkpoint
from beit3_ds.checkpoint.index import AVERAGE, KINDS
from beit3_ds.checkpoint.slices import whole_slice
from beit3_ds.config import ConfigError
from tests.checkpoint.small_state import SmallRun
from tests.ranks import run_ranks
from tests.training.steps import Deal, accumulate_step, config_for, error_ratios, logical_tensors, plain_steps

DECAY = 0.7
GROUPS = {"layer_decay": 0.6, "head_learning_rate_scale": 3.0, "frozen": ["embeddings.image_position"]}
STEPS = 2  # before the save

LAYOUTS: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "one rank": (1, (0,), {}),
    "data 2": (2, (1, 2, 3), {}),
    "tensor 2": (2, (1,), {"tensor_parallel_size": 2}),
    "pipeline 2": (2, (0, 3), {"pipeline_parallel_size": 2}),
}
"""Number of ranks, ZeRO stages and keys of the section "parallel", per layout."""


def deal_of(num_data_ranks: int) -> Deal:
    return [[[0, 1, 2, 3], [4, 5, 6, 7]]] if num_data_ranks == 1 else [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


class Trained:
    """Holds an engine, its state and a checkpoint store on one rank."""

    def __init__(self, mesh: Any, zero_stage: int, folder: Path, parallel: dict[str, Any], **training: Any) -> None:
        from beit3_ds.checkpoint.engine_state import EngineState
        from beit3_ds.checkpoint.run_description import RunDescription
        from beit3_ds.checkpoint.store import CheckpointStore
        from beit3_ds.tasks import build_task
        from beit3_ds.training.engine import build_schedule

        zero = {"zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 64}}
        self.config = config_for(zero_stage, training=training, deepspeed=zero if zero_stage == 3 else None, **parallel)
        self.mesh, self.schedule = mesh, build_schedule(build_task(self.config), mesh)
        self.state = EngineState(self.schedule.engine, mesh, self.config.training.ema_decay)
        run = RunDescription(model={}, config={}, tokenizers={}, layout="", versions={})
        self.store = CheckpointStore(folder, 3, mesh, run, 300)

    def train(self, steps: range) -> None:
        from beit3_ds.training.engine import apply_update

        for step in steps:
            accumulate_step(self.schedule, self.config, self.mesh, deal_of(self.mesh.data_parallel_size), step)
            apply_update(self.schedule.engine, self.mesh)
            self.state.update_average()

    def save(self, step: int) -> None:
        self.store.save(self.state, step)
        self.store.finish()
        (outcome,) = self.store.take_outcomes()
        assert outcome.error is None, outcome.error

    def used(self) -> dict[str, Tensor]:
        """Returns the parameters that this stage uses in the forward pass."""
        import deepspeed

        named = dict(self.schedule.engine.module.named_parameters())
        with deepspeed.zero.GatheredParameters(list(named.values())):
            return logical_tensors({name: p.detach().clone() for name, p in named.items()}, named, self.mesh, "used")


def train_save_and_resume(stages: tuple[int, ...], parallel: dict[str, Any], root: Path) -> list[dict[str, Tensor]]:
    """Writes the checkpoints to compare; returns, by stage, the parameters that an evaluation with averages uses."""
    from beit3_ds.runtime.process_group import init_process_group

    mesh, results = init_process_group(config_for(0, **parallel).parallel), []
    for zero_stage in stages:
        training = {**GROUPS, "ema_decay": DECAY}
        first = Trained(mesh, zero_stage, root / f"{zero_stage}-first", parallel, **training)
        first.train(range(STEPS))
        first.save(STEPS)
        before = first.used()
        with first.state.averaged_weights():
            results.append(first.used())
        assert all(torch.equal(value, before[name]) for name, value in first.used().items()), "weights are not back"
        first.train(range(STEPS, STEPS + 1))
        first.save(STEPS + 1)
        first.schedule.engine.destroy()
        for name, changes in {"same": {}, "other groups": {"layer_decay": 1.0, "frozen": []}}.items():
            changed: dict[str, Any] = {**training, "seed": 2, **changes}
            resumed = Trained(mesh, zero_stage, root / f"{zero_stage}-first", parallel, **changed)
            _load_step(resumed, root / f"{zero_stage}-first")
            resumed.store = _store(mesh, root / f"{zero_stage}-{name}")
            if name == "same":
                resumed.train(range(STEPS, STEPS + 1))
            resumed.save(STEPS + (name == "same"))
            resumed.schedule.engine.destroy()
    mesh.close()
    return results


def _load_step(trained: Trained, root: Path) -> None:
    folder = CheckpointFolder(root / f"step-{STEPS:08d}")
    assert trained.store.load(trained.state, folder) == STEPS


def _store(mesh: Any, root: Path) -> Any:
    from beit3_ds.checkpoint.run_description import RunDescription
    from beit3_ds.checkpoint.store import CheckpointStore

    return CheckpointStore(
        root, 3, mesh, RunDescription(model={}, config={}, tokenizers={}, layout="", versions={}), 300
    )


def read(folder: Path, step: int) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint; keys are "KIND NAME"."""
    checkpoint = CheckpointFolder(folder / f"step-{step:08d}")
    tensors = {
        f"{kind} {name}": checkpoint.read_kind(kind, name, whole_slice(checkpoint.shape(name))).view(
            checkpoint.shape(name)
        )
        for kind in (*KINDS, AVERAGE)
        for name in checkpoint.names()
    }
    checkpoint.close()
    return tensors


def plain_averages() -> dict[str, Tensor]:
    """Returns averages of the weights of plain AdamW after `STEPS` steps in one process."""
    from beit3_ds.tasks import build_task
    from beit3_ds.training.engine import build_model
    from beit3_ds.training.optimizer import build_optimizer, freeze_parameters

    config = config_for(0, training=GROUPS)

    def build(model: torch.nn.Module) -> torch.optim.Optimizer:
        freeze_parameters(model, config)
        return build_optimizer(model, config)

    steps = plain_steps(config, build)
    averages = {name: p.detach().clone() for name, p in build_model(build_task(config)).named_parameters()}
    for step in range(STEPS):
        for name, average in averages.items():
            average.copy_(DECAY * average + (1 - DECAY) * steps[f"weight {step} {name}"])
    return {f"average {name}": average for name, average in averages.items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return plain_averages()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_average_alike(layout: str, expected: dict[str, Tensor], tmp_path: Path) -> None:
    ranks, stages, parallel = LAYOUTS[layout]
    used = run_ranks(train_save_and_resume, ranks, stages, parallel, tmp_path)
    for number, zero_stage in enumerate(stages):
        saved = read(tmp_path / f"{zero_stage}-first", STEPS)
        found = {name: value for name, value in saved.items() if name.startswith(AVERAGE)}
        assert found.keys() == expected.keys()
        ratios = error_ratios(found, expected)
        assert max(ratios.values()) <= 1, f"ZeRO-{zero_stage}: {max(ratios, key=ratios.__getitem__)}"
        for rank in used:  # evaluation uses the averages bit for bit
            assert all(torch.equal(value, saved[name.replace("used", AVERAGE)]) for name, value in rank[number].items())
        _check_equal(
            read(tmp_path / f"{zero_stage}-same", STEPS + 1), read(tmp_path / f"{zero_stage}-first", STEPS + 1)
        )
        _check_equal(read(tmp_path / f"{zero_stage}-other groups", STEPS), saved)


def _check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.usefixtures("lone_rank")
def test_a_checkpoint_without_averages_has_its_weights_as_averages(tmp_path: Path) -> None:
    assert SmallRun(tmp_path).save(1) == [None]
    tensors = read(tmp_path, 1)
    assert all(
        torch.equal(tensors[f"{AVERAGE} {name}"], tensors[f"weight {name}"]) for name in ("scale", "norm.weight")
    )
    with pytest.raises(ConfigError, match=r"step-00000001 holds no moving average .*without --ema"):
        open_checkpoint(tmp_path, averages=True)
