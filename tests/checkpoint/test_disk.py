"""Tests files that are synced while they are written."""

import errno
import hashlib
import os
import threading
from pathlib import Path

import pytest

from beit3_ds.checkpoint import disk
from beit3_ds.checkpoint.disk import NewFile


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_SYNC_BYTES", 4)


@pytest.mark.usefixtures("eager")
def test_what_is_written_is_synced_meanwhile_and_all_of_it_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, begun, fsync = [], threading.Event(), os.fsync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (order.append("meanwhile"), begun.set()))
    monkeypatch.setattr(os, "fsync", lambda descriptor: (order.append("end"), fsync(descriptor)))
    with NewFile(tmp_path / "file") as file:
        file.write(b"12345678")
        assert begun.wait(10)
        file.write(b"90")
    assert order[-1] == "end"
    assert order.count("end") == 1
    assert (tmp_path / "file").read_bytes() == b"1234567890"
    assert file.sha256 == hashlib.sha256(b"1234567890").hexdigest()


@pytest.mark.usefixtures("eager")
def test_a_sync_that_failed_meanwhile_fails_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fail)
    # The system reports a failed write-back once, so the sync at the end succeeds.
    with pytest.raises(OSError, match="lost"), NewFile(tmp_path / "file") as file:
        file.write(b"12345678")
