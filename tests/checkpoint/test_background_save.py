"""Tests saving to a file system that does not answer."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.checkpoint.background_save import BackgroundSave
from beit3_ds.checkpoint.collection import CheckpointCollection
from beit3_ds.parallel import HostGroup, Mesh
from beit3_ds.storage_error import StorageError
from tests.checkpoint.small_state import SmallState, describe


class HangingCollection(CheckpointCollection):
    """Simulates a disk on which the creation of a folder never returns."""

    def create_temporary(self, step: int) -> Path:
        threading.Event().wait()
        raise AssertionError


def test_save_that_never_ends_is_named(tmp_path: Path) -> None:
    """Catches training that waits forever for the previous save; no other rank waits, so no time-out would end it."""
    state: Any = SmallState()
    save = BackgroundSave(HangingCollection(tmp_path, 1), Mesh(), HostGroup(), describe(), timeout_seconds=1.0)
    start = time.monotonic()
    save.start(state.train_to(1), 1, {}, start)
    with pytest.raises(StorageError, match=rf"rank 0 .*has waited 1 s for a save in {tmp_path}"):
        save.wait()
    assert time.monotonic() - start < 30
    save.wait()  # the way out of the program does not wait for it again
    assert save.take_outcomes() == []
