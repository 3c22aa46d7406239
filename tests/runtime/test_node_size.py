"""Tests that a run too large for its machine ends before a process group exists."""

from typing import Any

import pytest

from beit3_ds import train
from beit3_ds.config import ConfigError, build_run_config
from beit3_ds.planner import NodeSize
from beit3_ds.runtime.node_size import measure_node


def test_this_machine_is_measured() -> None:
    node = measure_node()
    assert node.memory is not None and node.memory > 1 << 28
    assert node.shm is None or node.shm >= 0


def test_a_machine_without_room_for_prefetched_steps_is_refused(
    run_mapping: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed as dist

    run_mapping["beit3_ds"]["data"]["num_workers"] = 2
    monkeypatch.setattr(train, "measure_node", lambda: NodeSize(shm=1 << 16, name="host small"))
    with pytest.raises(ConfigError, match="host small has 0"):  # catches a SIGBUS in the middle of a step
        train.train_run(build_run_config(run_mapping))
    assert not dist.is_initialized()
