"""Provides fixtures for the tests of checkpoints."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def lone_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Provides one process group of this process for all stores; a group per store costs 10 ms and three threads."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist, "new_group", lambda **options: dist.group.WORLD)
    yield
    dist.destroy_process_group()
