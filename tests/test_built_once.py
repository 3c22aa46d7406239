"""Tests that a fixture's files are built once, and again only after a failure."""

from pathlib import Path

import pytest

from tests.built_once import build_once


def test_files_are_built_once_per_run(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a failed build that counts as done, and workers of one test run that do not share files."""
    calls: list[Path] = []

    def build(folder: Path) -> None:
        calls.append(folder)
        if len(calls) == 1:
            raise OSError("the disk is full")
        (folder / "file").write_text("content")

    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    base = tmp_path_factory.mktemp("run")
    with monkeypatch.context() as worker:
        worker.setattr(tmp_path_factory, "getbasetemp", lambda: base)
        with pytest.raises(OSError, match="full"):
            build_once(tmp_path_factory, "files", build)
        folder = build_once(tmp_path_factory, "files", build)
    for number in range(2):
        with monkeypatch.context() as worker:
            worker.setenv("PYTEST_XDIST_WORKER", f"gw{number}")
            worker.setattr(tmp_path_factory, "getbasetemp", lambda number=number: base / f"popen-gw{number}")
            assert build_once(tmp_path_factory, "files", build) == folder
    assert calls == [folder] * 2
    assert (folder / "file").read_text() == "content"
