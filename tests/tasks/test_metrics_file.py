"""Metrics are written even if a result file is missing, which is a failure all the same."""

import json
from pathlib import Path

import pytest

from beit3_ds.config import ConfigError
from beit3_ds.retrying.folder import ResultFolder
from beit3_ds.storage_error import StorageError
from beit3_ds.tasks.metrics_file import format_metrics, write_metrics

CONTENT = {"task": "nlvr2", "split": "test", "weights": "w.safetensors", "step": 3, "metrics": {"accuracy": 0.5}}


def test_a_result_file_that_is_missing_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches status 0 without the file that an evaluation server wants; the metrics are written all the same."""
    folder = ResultFolder(tmp_path / "out", print)
    (tmp_path / "out" / "predictions.csv").mkdir(parents=True)
    folder.write("predictions.csv", lambda path: path.write_text("") and None)
    with pytest.raises(StorageError, match=r"not written: .*/out/predictions\.csv\. Make room"):
        write_metrics(CONTENT, folder)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"] == {"accuracy": 0.5}
    (tmp_path / "out" / "predictions.csv").rmdir()
    write_metrics(CONTENT, folder)
    assert capsys.readouterr().out.endswith(f"results: {tmp_path}/out\n")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(ConfigError, match=r"/out cannot be written.*--out"):
        write_metrics(CONTENT, ResultFolder(tmp_path / "out", print))


def test_the_table_names_weights_or_results() -> None:
    assert format_metrics(CONTENT) == "nlvr2 on test, weights w.safetensors (step 3):\n  accuracy  0.5000"
    scored = {"task": "detection", "split": "validation", "results": ["a.json", "b.json"], "metrics": {"box_AP": 1.0}}
    assert format_metrics(scored).startswith("detection on validation, results a.json, b.json:")
    assert format_metrics(CONTENT | {"metrics": {}}).endswith("the split has no annotations, so nothing is scored")
