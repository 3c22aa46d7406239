"""Tests that the sockets of workers get a short folder, however long TMPDIR is."""

import multiprocessing
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.data.workers import fork_server
from beit3_ds.data.workers.fork_server import use_short_socket_folder


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Restores the settings of multiprocessing after the test."""
    config: dict[str, Any] = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    before = dict(config)
    config.pop("tempdir", None)
    yield config
    config.clear()
    config.update(before)


def test_a_short_folder_stays(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    use_short_socket_folder()
    assert "tempdir" not in settings


def test_a_long_folder_is_replaced(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("d" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    use_short_socket_folder()
    assert len(settings["tempdir"]) < 40  # catches a name that no AF_UNIX address can hold
    assert Path(settings["tempdir"]).is_dir()


def test_without_a_short_folder_the_message_says_so(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("d" * 100)))
    monkeypatch.setattr(fork_server, "_SHORT_FOLDERS", ("/nowhere",))
    with pytest.raises(ConfigError, match=r"TMPDIR=.* is too long .*/nowhere can be written"):
        use_short_socket_folder()
