"""Fixtures of the tests of checkpoints."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from tests.checkpoint.training_run import TrainingRun


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process alone, which all stores share: one each would cost 10 ms and three threads."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "new_group", lambda **options: dist.group.WORLD)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def finished_runs() -> dict[str, TrainingRun]:
    """Runs that several tests compare theirs with."""
    return {}


@pytest.fixture
def undisturbed(
    run_mapping: dict[str, Any], finished_runs: dict[str, TrainingRun], tmp_path_factory: pytest.TempPathFactory
) -> TrainingRun:
    """`run_mapping` with twelve steps on two ranks, from the start to the end in one go."""
    if "two ranks" not in finished_runs:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        run = TrainingRun(run_mapping, folder, 2, total_steps=12, save_interval=12, eval_interval=1000)
        assert run.finish() == [0, 0]
        finished_runs["two ranks"] = run
    return finished_runs["two ranks"]
