"""Tests that tensor files of other projects are read as data or refused, and that their code never runs."""

import argparse
import contextlib
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from beit3_ds.config import ConfigError
from beit3_ds.untrusted_file import read_tensors
from beit3_ds.weights.reader import open_weights

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}


@pytest.mark.parametrize("wrap", ["", "model", "state_dict"])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_tensors_are_read(kind: str, wrap: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.safetensors" if kind == "safetensors" else "x.pth")
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        state = {wrap: STATE, "args": argparse.Namespace(lr=1.0)} if wrap else STATE
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    found = read_tensors(path)
    assert found.keys() == STATE.keys() and all(torch.equal(found[name], value) for name, value in STATE.items())


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain"])
def test_a_crafted_pickle_runs_nothing(kind: str, tmp_path: Path) -> None:
    path, crater = tmp_path / "released.pth", tmp_path / "crater"
    content = {"model": STATE, "epoch": Bomb(crater)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "zip")
    for read in (read_tensors, open_weights):
        with pytest.raises(ConfigError, match=r"could run code.*never loaded"):
            read(path)
    assert not crater.exists()
    if kind == "zip":  # the only kind whose names torch lists
        with pytest.raises(ConfigError, match=r"_io\.open|builtins\.open|io\.open"):
            read_tensors(path)
    torch.load(path, weights_only=False) if kind != "plain" else pickle.loads(path.read_bytes())
    assert crater.exists()  # the bomb was one


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), zipped=st.booleans())
def test_a_damaged_file_is_refused_or_read(data: st.DataObject, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": STATE}, path, _use_new_zipfile_serialization=zipped)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(ConfigError):  # nothing else may come out
        read_tensors(path)


def test_other_content_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], {"model": {"a": 1}}, {"a": torch.ones(1), "step": 3}):
        torch.save(content, tmp_path / "x.pth")
        with pytest.raises(ConfigError, match="holds no tensors by name"):
            read_tensors(tmp_path / "x.pth")
    (tmp_path / "x.safetensors").write_bytes(b"short")
    for name in ("x.safetensors", "absent.safetensors", "absent.pth"):
        with pytest.raises(ConfigError, match="cannot be read as a file of tensors"):
            read_tensors(tmp_path / name)


def test_a_pipe_named_as_a_safetensors_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # catches a reader that waits for the pipe's other end
    with pytest.raises(ConfigError, match="not a regular file"):
        read_tensors(tmp_path / "pipe.safetensors")
