"""Builds the files of a fixture once per test run, for all workers of pytest-xdist."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Returns a folder that one worker of the test run has filled; callers must not change it.

    The first caller builds the files, and other callers wait.

    Args:
        factory: pytest's fixture `tmp_path_factory`.
        name: name of the folder, which identifies the files.
        build: writes the files into the existing folder.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # that of the run; each worker has a folder below it
    folder, complete = base / "built" / name, base / "built" / f"{name}.complete"
    folder.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            build(folder)
            complete.touch()
    return folder
