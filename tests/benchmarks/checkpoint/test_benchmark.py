"""Tests the checkpoint benchmark: its choice of a size, and ratios that are the right way up."""

import json
import math
from pathlib import Path

import pytest

from beit3_ds.benchmarks.checkpoint import benchmark as bench
from beit3_ds.config import ConfigError


@pytest.mark.slow
def test_figures_are_written_and_nothing_stays_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_SAVES", "_LOADS", "_EXPORTS"):
        monkeypatch.setattr(bench, name, 1)
    scratch, out = tmp_path / "scratch", tmp_path / "checkpoint.json"
    table = bench.benchmark_checkpoint("tiny", 1, str(scratch), str(out))
    assert not list(scratch.iterdir())
    result = json.loads(out.read_text())
    assert {(row["operation"], row["by"]) for row in result["rows"]} == {
        (operation, by) for operation in ("save", "load", "export") for by in ("beit3_ds", "deepspeed")
    }
    summary = result["summary"]
    assert {"export_memory_ratio", "export_time_ratio", "stall_share"} <= set(summary)
    figures = {name: value for name, value in summary.items() if name not in ("size", "load_average")}
    assert all(0 < value < math.inf for value in figures.values()), figures
    state = 36e6 * 12  # bytes of weights and moments
    for row in result["rows"]:
        assert row["peak_bytes"] > (36e6 * 4 if row["operation"] == "export" else state)  # catches kB taken for bytes
    assert summary["export_memory_ratio"] > 1  # catches a ratio upside down
    assert "| export | zero_to_fp32 |" in table


def test_the_largest_size_that_fits_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "_available_bytes", lambda: 22 << 30)
    assert bench.choose_size(None, 2, tmp_path).size == "large"
    monkeypatch.setattr(bench, "_available_bytes", lambda: 21 << 30)
    assert bench.choose_size(None, 2, tmp_path).size == "base"
    with pytest.raises(ConfigError, match=r"large needs 21\.2 GiB and 27 GiB"):
        bench.choose_size("large", 2, tmp_path)


def test_an_unknown_size_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'huge' is not one of"):
        bench.choose_size("huge", 2, tmp_path)
