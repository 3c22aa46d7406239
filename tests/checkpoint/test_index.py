"""The index of a checkpoint: what it says beside the tensors comes back as it was written."""

import hashlib
import json
from pathlib import Path

import pytest

from beit3_ds.checkpoint.index import INDEX_NAME, read_index
from tests.checkpoint.small_state import SmallRun

DATA = {"positions": {"texts": {"turns": 2**40, "sources": [["é.txt", 0.5, None]]}}}


@pytest.mark.usefixtures("lone_rank")
def test_state_of_the_data_comes_back(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.store.save(run.state.train_to(3), 3, DATA)
    run.store.finish()
    newest = run.store.newest()
    assert newest is not None
    assert newest.index.data == DATA  # catches a state that is saved but not read
    assert run.resume() == 3


@pytest.mark.usefixtures("lone_rank")
def test_an_index_without_state_of_the_data_loads(tmp_path: Path) -> None:
    """Checkpoints of older versions have none."""
    run = SmallRun(tmp_path)
    assert run.save(3) == [None]
    path = tmp_path / "step-00000003" / INDEX_NAME
    content = json.loads(path.read_bytes())
    del content["sha256"], content["data"]
    content["sha256"] = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(content))
    assert read_index(path.parent).data == {}
    assert run.resume() == 3
