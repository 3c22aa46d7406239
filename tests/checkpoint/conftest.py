"""Provides fixtures for the tests of checkpoints."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.checkpoint.saved_steps import BEFORE, NEWEST
from tests.checkpoint.small_state import SmallRun


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provides one process group of a single process for all stores; a group per store would cost 10 ms."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "new_group", lambda **options: dist.group.WORLD)
    yield
    dist.destroy_process_group()


@pytest.fixture
def root(tmp_path: Path, lone_rank: None) -> Path:
    """Saves checkpoints of two steps; returns their folder."""
    assert SmallRun(tmp_path / "checkpoints").save(BEFORE, NEWEST) == [None, None]
    return tmp_path / "checkpoints"
