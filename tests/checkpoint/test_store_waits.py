"""A save on a file system that does not answer."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from beit3_ds.checkpoint.store import CheckpointStore
from beit3_ds.storage_error import StorageError


def test_save_that_never_ends_is_named(tmp_path: Path) -> None:
    """Catches a training that waits for ever for the save before: no other rank waits, so nobody ends it."""
    store: Any = CheckpointStore.__new__(CheckpointStore)
    store.root, store._rank, store._timeout_seconds = tmp_path, 3, 1.0
    store._mesh = type("Mesh", (), {"activity": type("Activity", (), {"begin": lambda *_: None})()})()
    store._thread = threading.Thread(target=threading.Event().wait, daemon=True)
    store._thread.start()
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"rank 3 .*has waited 1 s for a save in {tmp_path}"):
        store.finish()
    assert time.monotonic() - start < 30
    store.finish()  # the way out of the program does not wait for it again
