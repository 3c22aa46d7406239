"""Tests torch files that are written block by block."""

from pathlib import Path

import pytest
import torch

from beit3_ds.weights.planned_tensor import PlannedTensor
from beit3_ds.weights.state_dict_file import write_state_dict_file

TENSORS = {
    "matrix": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7).to(torch.bfloat16),
    "count": torch.tensor(2**40),
    "column": torch.arange(6.0).view(3, 2).T,  # not contiguous
}


def test_torch_loads_what_is_written(tmp_path: Path) -> None:
    planned = [
        PlannedTensor(name, x.dtype, tuple(x.shape), lambda x=x: x.flatten().split(4)) for name, x in TENSORS.items()
    ]
    write_state_dict_file(tmp_path / "weights.pth", planned, {"note": "text"})
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content.keys() == {"model", "note"} and content["note"] == "text"
    assert list(content["model"]) == list(TENSORS)
    for name, tensor in content["model"].items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize  # catches one storage for all
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]
    with pytest.raises(FileExistsError):
        write_state_dict_file(tmp_path / "weights.pth", planned, {})
