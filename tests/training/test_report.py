"""Tests the report of a finished run, and that a page that cannot be drawn does not change the exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_train import finish as finish_run


def finish(mapping: dict[str, Any], folder: Path, **environment: str) -> str:
    """Trains in a new process, checks for status 0, and returns the output."""
    mapping["beit3_ds"]["training"] |= {"total_steps": 1, "save_interval": 1, "eval_interval": 1}
    path = folder / "config.json"
    path.write_text(json.dumps(mapping))
    if environment:  # read by Python and libraries when they start
        command = [sys.executable, "-m", "beit3_ds.train", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | environment)
        status, output = done.returncode, done.stdout + done.stderr
    else:
        status, output = finish_run(path)
    assert status == 0, output
    assert "Traceback" not in output
    return output


@pytest.mark.slow
def test_notebook_backend_and_streams_without_validation_data(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a report that requires images, or fails because a notebook's processes inherit MPLBACKEND."""
    for stream in ("images", "pairs"):
        run_mapping["beit3_ds"]["data"][stream]["validation"] = []
    output = finish(run_mapping, tmp_path, MPLBACKEND="inline_of_a_notebook")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert list(summary["validation"]) == ["text_mlm"]
    for name in ("plot", "predictions"):
        assert Path(summary[name]).stat().st_size > 0 and f"{name}: {summary[name]}" in output


def test_run_without_matplotlib_or_validation_data_finishes(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Catches a summary that names pages that do not exist."""
    for stream in ("images", "pairs", "texts"):
        run_mapping["beit3_ds"]["data"][stream]["validation"] = []
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise ImportError('libfreetype.so.6: no such file')")
    search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    output = finish(run_mapping, tmp_path, PYTHONPATH=search)
    (line,) = (line for line in output.splitlines() if line.startswith("WARNING"))
    assert line == f"WARNING: {tmp_path}/run/losses.png was not written: ImportError: libfreetype.so.6: no such file"
    assert "No stream has validation data" in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not {"plot", "predictions"} & summary.keys()
    assert "predictions" not in output and "plot:" not in output


def test_pages_that_cannot_be_written_are_named(run_mapping: dict[str, Any], tmp_path: Path) -> None:
    """Puts folders in the places of the pages, which raises OSError like a full disk or a lost file system."""
    names = ("losses.png", "predictions.html", "summary.json")
    for name in names:
        (tmp_path / "run" / name / "in the way").mkdir(parents=True)
    lines = [line for line in finish(run_mapping, tmp_path).splitlines() if line.startswith("WARNING")]
    assert len(lines) == 4 and lines[3].startswith("WARNING: not written, because of the errors above: ")
    for name in names:
        assert any(f"{tmp_path}/run/{name} was not written: IsADirectoryError" in line for line in lines[:3])
        assert f"{tmp_path}/run/{name}" in lines[3]
