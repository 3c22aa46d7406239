"""Tests that each CSV file of a resumed run is one table."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from beit3_ds.training.csv_monitor import continue_csv_files


def start(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Returns DeepSpeed's monitor in a new process after `step` updates."""
    from deepspeed.monitor import csv_monitor
    from deepspeed.monitor.config import CSVConfig

    monkeypatch.setattr(csv_monitor.dist, "get_rank", lambda: 0)
    files = csv_monitor.csvMonitor(CSVConfig(enabled=True, output_path=str(folder), job_name="csv"))
    monitor = SimpleNamespace(csv_monitor=files)
    continue_csv_files(monitor, step)
    return monitor


def test_a_resumed_run_adds_rows_to_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second header and repeated rows of the steps between checkpoint and stop, which DeepSpeed writes."""
    first = start(tmp_path, -1, monkeypatch)
    first.csv_monitor.write_events([("train/loss", 5.0 - step, step) for step in (1, 2, 3)])
    resumed = start(tmp_path, 2, monkeypatch)
    resumed.csv_monitor.write_events([("train/loss", 2.5, 3), ("validation/loss", 2.0, 3)])
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,4.0", "2,3.0", "3,2.5"]
    assert (tmp_path / "csv" / "validation_loss.csv").read_text().split() == ["step,loss", "3,2.0"]
    new_run = start(tmp_path, -1, monkeypatch)
    new_run.csv_monitor.write_events([("train/loss", 6.0, 1)])
    assert (tmp_path / "csv" / "train_loss.csv").read_text().split() == ["step,loss", "1,6.0"]


def test_a_run_without_the_monitor_and_files_cut_by_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    continue_csv_files(SimpleNamespace(csv_monitor=None), 3)
    folder = tmp_path / "csv"
    folder.mkdir()
    (folder / "train_loss.csv").write_text("step,loss\r\n1,4.0\r\n2,")
    (folder / "empty.csv").write_text("")
    start(tmp_path, 1, monkeypatch)
    assert (folder / "train_loss.csv").read_text().split() == ["step,loss", "1,4.0"]
    assert (folder / "empty.csv").read_text().split() == ["step,empty"]


def test_tables_of_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rows deleted from a user's table, and a resumed run that fails on a file that it did not write."""
    folder = tmp_path / "csv"
    (folder / "folder.csv").mkdir(parents=True)
    contents = {
        "notes.csv": b"step,remark\r\n9,lowered the rate\r\nlater,look at it\r\n",
        "steps.csv": b"step,loss,remark\r\n9,1.0,by hand\r\n",
        "latin.csv": "step,latin\r\n9,gr\u00f6\u00dfer\r\n".encode("latin-1"),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    resumed = start(tmp_path, 1, monkeypatch)
    resumed.csv_monitor.write_events([("train/loss", 2.5, 2)])
    assert {name: (folder / name).read_bytes() for name in contents} == contents
    assert (folder / "train_loss.csv").read_text().split() == ["step,loss", "2,2.5"]
