"""Compares this project's reader and writer of safetensors files with the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from beit3_ds.checkpoint.disk import file_sha256
from beit3_ds.checkpoint.tensor_file import BrokenTensorFileError, TensorEntry, TensorFile, write_tensor_file

TENSORS = {
    "matrix": torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0)),
    "half": torch.arange(7).to(torch.bfloat16),
    "count": torch.tensor(2**40),
    "none": torch.zeros(0, 4),
    "flags": torch.tensor([True, False]),
}


def write(path: Path) -> str:
    """Writes all tensors to a file; returns its digest."""
    entries = [TensorEntry(name, x.dtype, tuple(x.shape)) for name, x in TENSORS.items()]
    written = write_tensor_file(path, entries, lambda name: TENSORS[name].flatten().split(4), {"note": "é"})
    assert written.num_bytes == path.stat().st_size
    return written.sha256


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    digest = write(tmp_path / "ours")
    assert digest == file_sha256(tmp_path / "ours")
    with safe_open(tmp_path / "ours", "pt") as file:
        assert file.metadata() == {"note": "é"}
    for name, tensor in load_file(tmp_path / "ours").items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name]), name


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs")
    file = TensorFile(tmp_path / "theirs")
    for name, tensor in TENSORS.items():
        assert torch.equal(file.read(name), tensor), name
    rows = file.read_rows("matrix", 1, 4)
    assert torch.equal(rows, TENSORS["matrix"].view(5, 6)[1:4])
    target = torch.zeros(2, 6)
    file.read_rows_into(target, "matrix", 3)
    assert torch.equal(target, TENSORS["matrix"].view(5, 6)[3:])
    with pytest.raises(BrokenTensorFileError, match="no tensor 'other'"):
        file.read("other")
    file.close()


def test_cut_and_foreign_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    path = tmp_path / "cut"
    for size in (0, 7, 100):
        path.write_bytes(content[:size])
        with pytest.raises(BrokenTensorFileError):
            TensorFile(path)
    path.write_bytes(content[:-1])
    with pytest.raises(BrokenTensorFileError, match="it has 495 bytes instead of 496"):
        TensorFile(path).read(list(TENSORS)[-1])
    path.write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(BrokenTensorFileError, match="not a whole safetensors file"):
        TensorFile(path)
    with pytest.raises(FileExistsError):
        write(tmp_path / "whole")
