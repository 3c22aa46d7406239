"""Builds the files of a fixture once per test run, for all workers of pytest-xdist."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Returns a folder that the first caller of a test run has filled; others wait for it and must not change it.

    Args:
        factory: pytest's fixture `tmp_path_factory`.
        name: name of the folder, one per set of files.
        build: writes the files into the folder, which exists.
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
