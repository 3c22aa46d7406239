"""Tests that the index of a checkpoint is read as it was written, and that old tensor names are renamed."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from beit3_ds.checkpoint.folder import CheckpointFolder
from beit3_ds.checkpoint.index import INDEX_NAME, KINDS, read_index
from beit3_ds.checkpoint.slices import TensorSlice, whole_slice
from beit3_ds.model.renamed_tensors import RENAMED_TENSORS
from tests.checkpoint.small_state import SHAPES, SmallRun, values_at

DATA = {"positions": {"texts": {"turns": 2**40, "sources": [["é.txt", 0.5, None]]}}}


@pytest.mark.usefixtures("lone_rank")
def test_state_of_the_data_comes_back(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.store.save(run.state.train_to(3), 3, DATA)
    run.store.finish()
    newest = run.store.agree_on_newest()
    assert newest is not None
    assert newest.index.data == DATA  # catches a state that is saved but not read
    assert run.resume() == 3


@pytest.mark.usefixtures("lone_rank")
def test_an_index_without_state_of_the_data_loads(tmp_path: Path) -> None:
    """Checks checkpoints of older versions, whose index has no data state."""
    run = SmallRun(tmp_path)
    assert run.save(3) == [None]
    path = tmp_path / "step-00000003" / INDEX_NAME
    content = json.loads(path.read_bytes())
    del content["sha256"], content["data"]
    content["sha256"] = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    path.write_text(json.dumps(content))
    assert read_index(path.parent).data == {}
    assert run.resume() == 3


@pytest.mark.usefixtures("lone_rank")
def test_weights_and_moments_of_an_old_checkpoint_have_their_new_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SmallRun(tmp_path).save(3) == [None]
    written = (tmp_path / "step-00000003" / INDEX_NAME).read_bytes()
    monkeypatch.setitem(RENAMED_TENSORS, "norm.", "final_norm.")
    folder = CheckpointFolder(tmp_path / "step-00000003")
    assert folder.names() == ["embedding.weight", "final_norm.weight", "scale"]
    assert folder.shape("final_norm.weight") == SHAPES["norm.weight"]
    for kind in KINDS:
        values = folder.read_kind(kind, "final_norm.weight", whole_slice(SHAPES["norm.weight"]))
        assert torch.equal(values.flatten(), values_at(3, kind, "norm.weight"))
    assert folder.read("final_norm.weight", TensorSlice(1, 3, 0, 1)).shape == (2, 1)
    assert read_index(folder.path).to_json() == written  # files keep their names, so the index must
