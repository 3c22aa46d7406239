"""Tests that files with old tensor names are read under the current names; tests/checkpoint covers checkpoints."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit3_ds.model import PretrainedWeights
from beit3_ds.model.renamed_tensors import RENAMED_TENSORS, stored_names
from beit3_ds.tasks.pretraining.model import PretrainingModel
from tests.batches import small_model_config
from tests.weights.models import exported, random_model


def test_only_whole_beginnings_are_renamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RENAMED_TENSORS, "old_norm.", "norm.")
    names = ["old_norm.weight_vision", "old_heads.normal.weight", "released.old_norm.weight", "norm.bias"]
    current = ["norm.weight_vision", "old_heads.normal.weight", "released.old_norm.weight", "norm.bias"]
    assert stored_names(names) == dict(zip(current, names, strict=True))


def test_no_current_name_is_an_old_one() -> None:
    """Catches an entry of the table that would rename a current tensor."""
    names = list(dict(PretrainingModel(small_model_config()).named_parameters()))
    assert stored_names(names) == dict(zip(names, names, strict=True))


def test_an_old_export_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(small_model_config())
    path = exported(model, tmp_path / "weights.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({f"old.{name}" if "heads." in name else name: x for name, x in load_file(path).items()}, path, header)
    monkeypatch.setitem(RENAMED_TENSORS, "old.heads.", "heads.")
    assert set(PretrainedWeights(path).names()) == set(dict(model.named_parameters()))
    loaded = PretrainingModel.from_pretrained(path)
    for name, parameter in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], parameter), name
