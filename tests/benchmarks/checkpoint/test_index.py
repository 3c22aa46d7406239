"""Tests that the benchmark of the checkpoint's index measures every part of the work and deletes its files."""

import json
from pathlib import Path

import pytest

from beit3_ds.benchmarks.checkpoint.index import benchmark_index


def test_figures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    table = benchmark_index(3, "tiny", str(tmp_path / "index.json"))
    summary = json.loads((tmp_path / "index.json").read_text())["summary"]
    assert (summary["ranks"], summary["size"]) == (3, "tiny")
    assert f"{summary['pieces']:,} pieces" in table and summary["bytes"] > 5 * 8 * summary["pieces"]
    assert len(summary["seconds"]) == 6 and all(value >= 0 for value in summary["seconds"].values())
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]
